"""What the user holds: distributions that say how they are represented, one in each file."""

from kljax._engine.side import Distribution as Distribution
from kljax.distributions.arrays import Logits as Logits
from kljax.distributions.arrays import LogProbs as LogProbs
from kljax.distributions.arrays import Probs as Probs
from kljax.distributions.head import Head as Head
from kljax.distributions.top_k import TopK as TopK
