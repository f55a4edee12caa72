"""One-pass reward modeling as pure mathematics in float64 (Li et al. 2025, arXiv 2502.07193).

Estimators of a linear reward r = phi^T theta from feature differences z = phi(chosen) - phi(rejected). Each has
`step(z_BD)`, `theta_D`, `average_D`, `curvature` (`apply`, `solve`, `norm_inverse`), `state_dict()` and `load_state_dict()`.
The optimizers `omd`, `omd_cg`, `omd_memoryless` and `mle` run them on a reward model's head.
"""

from __future__ import annotations

from rlhf_algos.one_pass.conjugate import Solution, conjugate_gradient, released_iteration
from rlhf_algos.one_pass.curvature import Curvature, Dense, LowRank
from rlhf_algos.one_pass.damping import damping_at, released_damping
from rlhf_algos.one_pass.estimator import Estimator, Iterates
from rlhf_algos.one_pass.first_order import FirstOrder
from rlhf_algos.one_pass.logistic import gradient_sum, hessian_product, kappa, loss_sum, slopes
from rlhf_algos.one_pass.mle import Mle
from rlhf_algos.one_pass.omd import Omd
from rlhf_algos.one_pass.omd_cg import OmdCg
from rlhf_algos.one_pass.omd_memoryless import Direction, OmdMemoryless, direction
from rlhf_algos.one_pass.projection import project, project_by_inverse
from rlhf_algos.one_pass.store import load_estimator, read_state

__all__ = [
    "Curvature",
    "Dense",
    "Direction",
    "Estimator",
    "FirstOrder",
    "Iterates",
    "LowRank",
    "Mle",
    "Omd",
    "OmdCg",
    "OmdMemoryless",
    "Solution",
    "conjugate_gradient",
    "damping_at",
    "direction",
    "gradient_sum",
    "hessian_product",
    "kappa",
    "load_estimator",
    "loss_sum",
    "project",
    "project_by_inverse",
    "read_state",
    "released_damping",
    "released_iteration",
    "slopes",
]
