from normlab.catalog import METHODS as METHODS
from normlab.catalog import find_method as find_method
from normlab.method import Card as Card
from normlab.method import Method as Method
from normlab.method import Setting as Setting
from normlab.method import Source as Source
from normlab.method import Unsuitable as Unsuitable
from normlab.norms.filter_response_norm import FRN as FRN
from normlab.norms.filter_response_norm import FilterResponseNorm as FilterResponseNorm
from normlab.norms.filter_response_norm import ThresholdedLinearUnit as ThresholdedLinearUnit
from normlab.surgery.flow import trace_flow as trace_flow
from normlab.surgery.swap import swap as swap

__version__: str
