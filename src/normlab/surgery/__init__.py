"""Change any ``nn.Module``: swap layers, follow the flow of tensors, recalibrate.

The files here take classes and functions as arguments and know no method.
"""
