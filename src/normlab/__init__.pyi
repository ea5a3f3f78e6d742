from normlab.catalog import METHODS as METHODS
from normlab.catalog import find_method as find_method
from normlab.conversion import convert as convert
from normlab.conversion import fold as fold
from normlab.conversion import freeze as freeze
from normlab.growth.grower import Grower as Grower
from normlab.growth.pairs import find_pairs as find_pairs
from normlab.growth.widen import widen as widen
from normlab.inits.bn_init import bn_init_ as bn_init_
from normlab.inits.bn_init import param_groups as param_groups
from normlab.inits.bn_init_recipe import online_input_norm as online_input_norm
from normlab.inits.fixup import Branch as Branch
from normlab.inits.fixup import fixup_ as fixup_
from normlab.inits.fixup_any import fixup_any_ as fixup_any_
from normlab.inits.fixup_blocks import FixupBasicBlock as FixupBasicBlock
from normlab.inits.fixup_blocks import FixupBottleneck as FixupBottleneck
from normlab.inits.fixup_blocks import ScalarBias as ScalarBias
from normlab.inits.fixup_blocks import ScalarScale as ScalarScale
from normlab.inits.fixup_transformer import FixupDecoder as FixupDecoder
from normlab.inits.fixup_transformer import FixupEncoder as FixupEncoder
from normlab.inits.fixup_transformer import fixup_transformer_ as fixup_transformer_
from normlab.inits.gradinit import gradinit as gradinit
from normlab.inits.gradinit_learner import GradInit as GradInit
from normlab.method import Card as Card
from normlab.method import Method as Method
from normlab.method import Setting as Setting
from normlab.method import Source as Source
from normlab.method import Unsuitable as Unsuitable
from normlab.method import compose as compose
from normlab.method import split_groups as split_groups
from normlab.norms.accumulated_batch_norm import backward_jointly as backward_jointly
from normlab.norms.accumulated_batch_norm import forward_jointly as forward_jointly
from normlab.norms.batch_kalman_norm import BatchKalmanNorm as BatchKalmanNorm
from normlab.norms.batch_layer_norm import BatchLayerNorm as BatchLayerNorm
from normlab.norms.batch_layer_norm import population_epoch as population_epoch
from normlab.norms.batch_layer_statistics import Population as Population
from normlab.norms.batch_norm import SynchronizedBatchNorm as SynchronizedBatchNorm
from normlab.norms.batch_norm import synchronize as synchronize
from normlab.norms.batchless_norm import BatchlessNorm as BatchlessNorm
from normlab.norms.batchless_norm import collect_losses as collect_losses
from normlab.norms.batchless_norm import restart_from_data as restart_from_data
from normlab.norms.batchless_norm import start_from_data as start_from_data
from normlab.norms.batchless_norm import statistics_parameters as statistics_parameters
from normlab.norms.class_norm import ClassEmbedder as ClassEmbedder
from normlab.norms.class_norm import PrototypeClassifier as PrototypeClassifier
from normlab.norms.class_norm import normalize_attributes as normalize_attributes
from normlab.norms.class_norm import prototype_logits as prototype_logits
from normlab.norms.class_standardization import ClassStandardization as ClassStandardization
from normlab.norms.cross_iteration_batch_norm import (
    CrossIterationBatchNorm as CrossIterationBatchNorm,
)
from normlab.norms.cross_iteration_batch_norm import (
    cross_iteration_batch_norm as cross_iteration_batch_norm,
)
from normlab.norms.filter_response_norm import FRN as FRN
from normlab.norms.filter_response_norm import FilterResponseNorm as FilterResponseNorm
from normlab.norms.filter_response_norm import ThresholdedLinearUnit as ThresholdedLinearUnit
from normlab.norms.filter_response_norm import ramp_up_factor as ramp_up_factor
from normlab.norms.ghost_batch_norm import GhostBatchNorm as GhostBatchNorm
from normlab.norms.ic_layer import IndependentComponent as IndependentComponent
from normlab.norms.ic_layer import IndependentComponentUnit as IndependentComponentUnit
from normlab.norms.kalman_filter import Posterior as Posterior
from normlab.norms.none import ChannelBias as ChannelBias
from normlab.optim.accumulate import accumulate as accumulate
from normlab.optim.adaptive_clipping import AdaptiveClipping as AdaptiveClipping
from normlab.optim.adaptive_clipping import clip_adaptively_ as clip_adaptively_
from normlab.optim.batch_growth import BatchGrowth as BatchGrowth
from normlab.optim.bn_preconditioning import BatchNormPreconditioner as BatchNormPreconditioner
from normlab.optim.bnp_langevin import (
    BatchNormPreconditionedLangevin as BatchNormPreconditionedLangevin,
)
from normlab.optim.gradient_noise_scale import GradientNoiseScale as GradientNoiseScale
from normlab.optim.linear_scaling import WarmUp as WarmUp
from normlab.optim.linear_scaling import scaled_lr as scaled_lr
from normlab.optim.linear_scaling import warm_up as warm_up
from normlab.optim.weight_rescaling import WeightRescaler as WeightRescaler
from normlab.optim.weight_rescaling import equivalent_lr as equivalent_lr
from normlab.optim.weight_rescaling import rescale_ as rescale_
from normlab.regularizers.block_gates import BlockGates as BlockGates
from normlab.regularizers.block_gates import expected_depth as expected_depth
from normlab.regularizers.block_gates import survival_probs as survival_probs
from normlab.regularizers.dropout import GaussianDropout as GaussianDropout
from normlab.regularizers.dropout import monte_carlo as monte_carlo
from normlab.regularizers.dropout import project_max_norm_ as project_max_norm_
from normlab.regularizers.mixup import mixup as mixup
from normlab.regularizers.stochastic_depth import StochasticBlock as StochasticBlock
from normlab.regularizers.stochastic_depth import StochasticBranch as StochasticBranch
from normlab.surgery.branches import BranchPlan as BranchPlan
from normlab.surgery.branches import plan_branches as plan_branches
from normlab.surgery.checkpoint_activations import checkpoint_activations as checkpoint_activations
from normlab.surgery.conversion import Conversion as Conversion
from normlab.surgery.conversion import Unproven as Unproven
from normlab.surgery.flow import trace_flow as trace_flow
from normlab.surgery.fold_exported import fold_exported as fold_exported
from normlab.surgery.freeze import FrozenBatchNorm as FrozenBatchNorm
from normlab.surgery.freeze import unfreeze as unfreeze
from normlab.surgery.plan import Plan as Plan
from normlab.surgery.recalibrate import recalibrate as recalibrate
from normlab.surgery.scale_free import find_scale_free_weights as find_scale_free_weights
from normlab.surgery.swap import swap as swap
from normlab.weights.mean_only_batch_norm import MeanOnlyBatchNorm as MeanOnlyBatchNorm
from normlab.weights.spectral_norm import SpectralNorm as SpectralNorm
from normlab.weights.spectral_norm import bidirectional_spectral_norm as bidirectional_spectral_norm
from normlab.weights.spectral_norm import frozen_power_iteration as frozen_power_iteration
from normlab.weights.spectral_norm import spectral_norm as spectral_norm
from normlab.weights.target_space import target_space as target_space
from normlab.weights.target_space_conv import TargetConv2d as TargetConv2d
from normlab.weights.target_space_layer import TargetLinear as TargetLinear
from normlab.weights.target_space_model import TargetSpace as TargetSpace
from normlab.weights.target_space_recurrent import TargetRecurrent as TargetRecurrent
from normlab.weights.weight_norm_parametrization import remove_weight_norm as remove_weight_norm
from normlab.weights.weight_norm_parametrization import weight_normalize as weight_normalize
from normlab.weights.weight_norm_start import data_dependent_start as data_dependent_start
from normlab.weights.weight_standardization import WeightStandardization as WeightStandardization
from normlab.weights.weight_standardization import standardize_weight as standardize_weight
from normlab.weights.weight_standardization import standardize_weights as standardize_weights

__version__: str
