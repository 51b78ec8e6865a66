"""Parametric families: closed forms for the library's own divergences.

They work with `kl`, `forward_kl`, `reverse_kl`, `jeffreys`, `entropy` and `cross_entropy`;
``where``, ``temperature`` and ``class_axis_name`` do not apply. Batch shapes broadcast; ``axis``,
none by default, names the batch axes whose divergences are summed, as of independent components.
"""

from kljax._closed_forms import Family as Family
from kljax.families.bernoulli import Bernoulli as Bernoulli
from kljax.families.beta import Beta as Beta
from kljax.families.binomial import Binomial as Binomial
from kljax.families.categorical import Categorical as Categorical
from kljax.families.dirichlet import Dirichlet as Dirichlet
from kljax.families.exponential import Exponential as Exponential
from kljax.families.gamma import Gamma as Gamma
from kljax.families.geometric import Geometric as Geometric
from kljax.families.gumbel import Gumbel as Gumbel
from kljax.families.laplace import Laplace as Laplace
from kljax.families.log_normal import LogNormal as LogNormal
from kljax.families.multivariate_normal import MultivariateNormal as MultivariateNormal
from kljax.families.normal import Normal as Normal
from kljax.families.poisson import Poisson as Poisson
from kljax.families.uniform import Uniform as Uniform
from kljax.families.von_mises import VonMises as VonMises
