"""Balanced multimodal training with fused kernels.

When a network learns from several modalities at once, such as audio and video, the easier one
dominates back-propagation and the other stays under-trained. The methods here watch the modalities
during training and correct this, in any training loop and for any number of modalities.

One call takes the place of ``loss.backward()``:

    mmfuse.ogm_backward(loss, encoders={"audio": audio_net, "video": video_net},
                        logits={"audio": audio_logits, "video": video_logits}, labels=labels)

For a whole run there is an object, which has a state to save:

    ogm = mmfuse.OGM({"audio": audio_net, "video": video_net})
    out = ogm.backward(loss, logits, labels)       # out.as_dict() for a logger

Where to look next:

    list(mmfuse.METHODS)             the names of all methods
    help(mmfuse.OGM)                 a method: its formulas, arguments and release
    help(mmfuse.GradientMethod)      what all methods on gradients share
    help(mmfuse.unimodal_logits)     each modality's logits from a shared head
    help(mmfuse.unimodal_losses)     the baseline to compare with: unimodal losses
    help(mmfuse.scores)              scores for regression and other tasks
    dir(mmfuse), dir(mmfuse.ops)     everything public; the kernels are in `mmfuse.ops`
    python -m mmfuse --help          what is installed here, and a check of it
"""

from . import amp as amp
from . import ops as ops
from . import scores as scores
from ._version import __version__ as __version__
from .loop.gradients import GradientMethod as GradientMethod
from .loop.heads import unimodal_logits as unimodal_logits
from .loop.losses import unimodal_losses as unimodal_losses
from .loop.masking import unimodal_outputs as unimodal_outputs
from .loop.matching import match_parameters as match_parameters
from .loop.resampling import ContributionSampler as ContributionSampler
from .loop.scalars import ScalarLog as ScalarLog
from .loop.scalars import scalars_of as scalars_of
from .loop.shapley import shapley_responses as shapley_responses
from .methods._arm_samples import sample_contributions as sample_contributions
from .methods._ogm_backward import ogm_backward as ogm_backward
from .methods.agm import AGM as AGM
from .methods.agm import AGMResult as AGMResult
from .methods.arl import ARL as ARL
from .methods.arl import ARLResult as ARLResult
from .methods.arm import ARM as ARM
from .methods.arm import ARMResult as ARMResult
from .methods.catalogue import METHODS as METHODS
from .methods.cggm import CGGM as CGGM
from .methods.cggm import CGGMResult as CGGMResult
from .methods.inforeg import InfoReg as InfoReg
from .methods.inforeg import InfoRegResult as InfoRegResult
from .methods.learningrates import LearningRates as LearningRates
from .methods.learningrates import LearningRatesResult as LearningRatesResult
from .methods.lfm import LFM as LFM
from .methods.lfm import LFMResult as LFMResult
from .methods.mcr import MCR as MCR
from .methods.mcr import MCRResult as MCRResult
from .methods.mla import MLA as MLA
from .methods.mla import MLAFusion as MLAFusion
from .methods.mla import MLAResult as MLAResult
from .methods.mlb import MLB as MLB
from .methods.mlb import MLBResult as MLBResult
from .methods.mmpareto import MMPareto as MMPareto
from .methods.mmpareto import MMParetoResult as MMParetoResult
from .methods.modalitydropout import ModalityDropout as ModalityDropout
from .methods.modalitydropout import ModalityDropoutResult as ModalityDropoutResult
from .methods.noiseonly import NoiseOnly as NoiseOnly
from .methods.ogm import OGM as OGM
from .methods.ogm import OGMResult as OGMResult
from .methods.ogm import ogm_coefficients as ogm_coefficients
from .methods.opm import OPM as OPM
from .methods.opm import OPMResult as OPMResult
from .methods.opm import drop_probabilities as drop_probabilities
from .methods.pmr import PMR as PMR
from .methods.pmr import PMRResult as PMRResult
from .methods.redreg import RedReg as RedReg
from .methods.redreg import RedRegResult as RedRegResult
from .methods.relearning import ReLearning as ReLearning
from .methods.relearning import ReLearningResult as ReLearningResult
from .noise import NoiseStream as NoiseStream
from .ops import use_backend as use_backend

# Without `__all__`: `help(mmfuse)` prints each name of it in full, which were 15,000 lines. The
# aliases above say what is public.
_INNER = {"adapters", "loop", "methods", "noise", "reference", "triton"}


def __dir__() -> list[str]:
    named = (name for name in globals() if name not in _INNER)
    return sorted(name for name in named if not name.startswith("_") or name.startswith("__"))
