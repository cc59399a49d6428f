"""The public names, in one table: type checkers read it, and `lorasb/__init__.py` imports from it at first use."""

from . import functional as functional
from .app.prepare import demo_model as demo_model
from .backends import backend as backend
from .config.adapter import LoRASBConfig as LoRASBConfig
from .export.lora import adapter_delta as adapter_delta
from .export.lora import export_lora as export_lora
from .export.lora import lora_of as lora_of
from .init import BasisFit as BasisFit
from .init import InitReport as InitReport
from .init import basis_fit as basis_fit
from .init import first_step_lr as first_step_lr
from .init import initialize as initialize
from .layers.linear import LoRASBLinear as LoRASBLinear
from .layers.linear import equivalent_gradient as equivalent_gradient
from .layers.linear4bit import Linear4bit as Linear4bit
from .layers.linear4bit import quantize as quantize
from .optim import parameter_groups as parameter_groups
from .serving.bank import AdapterBank as AdapterBank
from .serving.basis import add_adapters as add_adapters
from .serving.joint_basis import project as project
from .serving.joint_basis import share_basis as share_basis
from .serving.training import AdapterRowsCallback as AdapterRowsCallback
from .serving.training import AdapterRowsCollator as AdapterRowsCollator
from .serving.training import adapter_losses as adapter_losses
from .serving.training import adapter_parameter_groups as adapter_parameter_groups
from .serving.training import clip_by_adapter as clip_by_adapter
from .training.init_callback import InitCallback as InitCallback
from .training.rate_trials import RateTrials as RateTrials
from .training.rate_trials import find_lr as find_lr
from .training.reinforcement import policy_loss as policy_loss
from .training.reinforcement import preference_loss as preference_loss
from .training.reinforcement import reward_batches as reward_batches
from .training.vllm_sampler import VLLMSampler as VLLMSampler
from .training.vllm_sampler import sync_to_vllm as sync_to_vllm
from .tuner.model import patch as patch

__version__: str
