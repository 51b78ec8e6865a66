"""kljax: the KL-divergence loss library for JAX."""

import typing as _typing
from importlib import import_module as _import_module
from importlib.metadata import PackageNotFoundError as _NotFound
from importlib.metadata import version as _version
from types import ModuleType as _ModuleType

from kljax._engine.paths import Chunked as Chunked
from kljax._engine.terms import log_mixture as log_mixture
from kljax._engine.terms import term_cross_entropy as term_cross_entropy
from kljax._engine.terms import term_entropy as term_entropy
from kljax._engine.terms import term_generalized_kl as term_generalized_kl
from kljax._engine.terms import term_kl as term_kl
from kljax._engine.value_checks import checked as checked
from kljax._engine.value_checks import value_checks as value_checks
from kljax._making import DivergenceFn as DivergenceFn
from kljax._making import divergence as divergence
from kljax.distributions import Distribution as Distribution
from kljax.distributions import Head as Head
from kljax.distributions import Logits as Logits
from kljax.distributions import LogProbs as LogProbs
from kljax.distributions import Probs as Probs
from kljax.distributions import TopK as TopK
from kljax.divergences import cross_entropy as cross_entropy
from kljax.divergences import entropy as entropy
from kljax.divergences import forward_kl as forward_kl
from kljax.divergences import jeffreys as jeffreys
from kljax.divergences import jensen_shannon as jensen_shannon
from kljax.divergences import kl as kl
from kljax.divergences import kl_terms as kl_terms
from kljax.divergences import reverse_kl as reverse_kl
from kljax.divergences import skew_forward_kl as skew_forward_kl
from kljax.divergences import skew_reverse_kl as skew_reverse_kl
from kljax.estimators import sampled_kl as sampled_kl
from kljax.estimators import sampled_kl_loss as sampled_kl_loss
from kljax.latents import balanced_kl as balanced_kl
from kljax.latents import elbo_kl as elbo_kl
from kljax.mixtures import mixture as mixture
from kljax.objectives import DistillationMetrics as DistillationMetrics
from kljax.objectives import consistency_loss as consistency_loss
from kljax.objectives import distillation_loss as distillation_loss
from kljax.reduction import reduce as reduce
from kljax.sparse import sample_targets as sample_targets
from kljax.sparse import top_k as top_k

_LAZY = ("compat", "families", "metrics", "training")  # loaded when they are asked for

if _typing.TYPE_CHECKING:
    from kljax import compat as compat
    from kljax import families as families
    from kljax import metrics as metrics
    from kljax import training as training
else:  # or type checkers would take any name for one that there is

    def __getattr__(name: str) -> _ModuleType:
        if name in _LAZY:
            return _import_module(f"kljax.{name}")
        raise AttributeError(f"module 'kljax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})


try:
    __version__ = _version("kljax")
except _NotFound:  # a checkout that is not installed
    __version__ = "0+unknown"
