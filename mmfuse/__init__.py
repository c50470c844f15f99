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

Next steps:

    list(mmfuse.METHODS)             the names of all methods
    help(mmfuse.OGM)                 a method: its arguments, release, and module of the formulas
    help(mmfuse.GradientMethod)      what all methods on gradients share
    help(mmfuse.unimodal_logits)     each modality's logits from a shared head
    help(mmfuse.unimodal_losses)     the baseline to compare with: unimodal losses
    help(mmfuse.scores)              scores for regression and other tasks
    help(mmfuse.imbalance_report)    how much a trained model depends on each modality
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
from .methods.catalogue import *  # noqa: F403
from .noise import NoiseStream as NoiseStream
from .ops import use_backend as use_backend
from .report.imbalance import imbalance_report as imbalance_report
from .report.summary import ImbalanceReport as ImbalanceReport

# Without `__all__`: `help(mmfuse)` prints each name of it in full, which were 15,000 lines. The
# aliases above say what is public.
_INNER = {"adapters", "loop", "methods", "noise", "reference", "report", "triton"}


def __dir__() -> list[str]:
    named = (name for name in globals() if name not in _INNER)
    return sorted(name for name in named if not name.startswith("_") or name.startswith("__"))
