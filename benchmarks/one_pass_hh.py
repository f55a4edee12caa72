"""One-pass reward modeling on the features of real preference pairs: the passive stream, active queries, and deployment.

FEATURES is what `one_pass_features.py` wrote of pairs, chosen first. A seed splits the pairs anew into a training stream and
held-out pairs and shuffles the stream; intervals are 95 % t-intervals over seeds. Every arm of a seed gets the same pairs,
order, batch size and precision. Features are scaled so that |z|^2 of a pair is 1 on average. Ridge and learning rates are
tuned on seed -1, on part of its training stream: one ridge for all by the fit of `mle`, and a rate for each estimator that
has one. Seconds are the processor's.

    python benchmarks/one_pass_hh.py passive FEATURES
    python benchmarks/one_pass_hh.py active FEATURES
    python benchmarks/one_pass_hh.py deploy FEATURES --user FEATURES_OF_ANOTHER_MODEL

`passive`: accuracy and loss on held-out pairs against the number of pairs, for all estimators. `active`: a quarter of each
batch of 32 is labeled, chosen before its labels are seen; accuracy at equal labels. `deploy`: a round offers 16 texts of the
file at random, a simulated user is shown two of them, and regret is counted.

The simulated user's utility is the fit of all pairs on the features of --user, scaled to a standard deviation of 1.5 over
texts. Its choices follow Bradley-Terry. `active --user` has it label the pairs; held-out pairs are then labeled without
noise.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from rlhf_algos.one_pass import Direction, FirstOrder, Mle, Omd, OmdCg, OmdMemoryless
from rlhf_algos.selection.deployment import Deployment, SimulatedUser, round_regret
from rlhf_algos.selection.queries import SCORES, Queries, top_share
from rlhf_core import make_from_spec

BATCH, POOL, ARMS, SPREAD = 8, 32, 16, 1.5
T_QUANTILE = {3: 4.303, 5: 2.776, 10: 2.262}
"""97.5 % quantile of Student's t by the number of seeds."""
RIDGES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
RATES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
SELECTORS = (
    "random_pair", "best_worst", "best_second", "best_quartile", "max_uncertainty", "optimistic", "drts", "delta_ucb",
)  # fmt: skip


def main() -> None:
    """Run one study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=["passive", "active", "deploy"])
    parser.add_argument("features", type=Path)
    parser.add_argument("--user", type=Path)
    parser.add_argument("--seeds", type=int, default=5, choices=sorted(T_QUANTILE))
    parser.add_argument("--heldout", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=1000, help="of deploy")
    options = parser.parse_args()
    torch.set_num_threads(1)
    {"passive": passive, "active": active, "deploy": deploy}[options.study](options)


# ----------------------------------------------------------------------------------------------------------------------
# pairs
# ----------------------------------------------------------------------------------------------------------------------


def read_features(path: Path) -> tuple[Tensor, Tensor]:
    """Features of all texts (R, D), centered and scaled, and the two texts of each pair (N, 2)."""
    tensors = load_file(path)
    features_RD, index_N2 = tensors["features_RH"].double(), tensors["index_NK"]
    features_RD = features_RD - features_RD.mean(0)
    z_ND = features_RD[index_N2[:, 0]] - features_RD[index_N2[:, 1]]
    return features_RD / z_ND.square().sum(1).mean().sqrt(), index_N2


def split(path: Path, seed: int, heldout: int) -> tuple[Tensor, Tensor]:
    """The training stream and the held-out pairs of a seed, z (N, D) each."""
    features_RD, index_N2 = read_features(path)
    z_ND = features_RD[index_N2[:, 0]] - features_RD[index_N2[:, 1]]
    order = torch.randperm(len(z_ND), generator=torch.Generator().manual_seed(1000 + seed))
    return z_ND[order[heldout:]], z_ND[order[:heldout]]


def measure(theta_D: Tensor, z_ND: Tensor) -> tuple[float, float]:
    """Accuracy, a tie counting as half, and loss in nats."""
    margins_N = z_ND @ theta_D
    right_N = (margins_N > 0).double() + 0.5 * (margins_N == 0).double()
    return float(right_N.mean()), float(torch.nn.functional.softplus(-margins_N).mean())


def interval(values: list[float], digits: int = 3) -> str:
    """Mean ± half the 95 % interval."""
    half = T_QUANTILE[len(values)] * statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.fmean(values):.{digits}f} ± {half:.{digits}f}"


def print_table(title: str, heads: list[str], rows: dict[str, list[str]]) -> None:
    """Print a Markdown table."""
    print(f"\n{title}\n\n| | " + " | ".join(heads) + " |\n|" + "---|" * (len(heads) + 1))
    for name, cells in rows.items():
        print(f"| `{name}` | " + " | ".join(cells) + " |", flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# estimators
# ----------------------------------------------------------------------------------------------------------------------


def makers(d: int, pairs: int, ridge: float) -> dict[str, Callable[[float], Any]]:
    """Estimators by name, from a learning rate, which those with a step size of 1 ignore."""
    total = -(-pairs // BATCH)
    return {
        "mle": lambda rate: Mle(d, damping=ridge),
        "omd": lambda rate: Omd(d, damping=ridge),
        "omd_cg": lambda rate: OmdCg(d, damping=ridge, rank=64),
        "omd_memoryless": lambda rate: OmdMemoryless(d, total=total, eta=rate),
        "released": lambda rate: OmdMemoryless(d, total=total, eta=rate, how=Direction(released=True)),
        "sgd": lambda rate: FirstOrder(d, lambda parameters: torch.optim.SGD(parameters, lr=rate)),
        "adamw": lambda rate: FirstOrder(d, lambda parameters: torch.optim.AdamW(parameters, lr=rate, weight_decay=0)),
    }


STEPPED = ("omd_memoryless", "released", "sgd", "adamw")
"""Estimators whose learning rate is tuned."""


def stream(estimator: Any, z_ND: Tensor) -> Iterator[int]:
    """Let the estimator take in batch after batch; yields how many pairs it saw."""
    for start in range(0, len(z_ND), BATCH):
        estimator.step(z_ND[start : start + BATCH])
        yield min(start + BATCH, len(z_ND))


def tune(path: Path, heldout: int) -> tuple[float, dict[str, float]]:
    """The ridge and the rates with the lowest loss on a fifth of the training stream of seed -1, after the other pairs."""
    z_ND, _ = split(path, -1, heldout)
    fit_ND, check_ND = z_ND[len(z_ND) // 5 :], z_ND[: len(z_ND) // 5]

    def loss(estimator: Any) -> float:
        for _ in stream(estimator, fit_ND):
            pass
        return measure(estimator.theta_D, check_ND)[1]

    def ridge_loss(ridge: float) -> float:
        estimator = Mle(z_ND.shape[1], damping=ridge)
        estimator.step(fit_ND)
        return measure(estimator.theta_D, check_ND)[1]

    ridge = min(RIDGES, key=ridge_loss)
    made = makers(z_ND.shape[1], len(fit_ND), ridge)
    scale = {"adamw": 0.01}  # its step is a rate per coordinate
    rates = {n: min((r * scale.get(n, 1) for r in RATES), key=lambda rate: loss(made[n](rate))) for n in STEPPED}
    print(f"ridge {ridge:g}; rates {', '.join(f'{name} {rate:g}' for name, rate in rates.items())}")
    return ridge, rates


# ----------------------------------------------------------------------------------------------------------------------
# studies
# ----------------------------------------------------------------------------------------------------------------------


def passive(options: argparse.Namespace) -> None:
    """Accuracy and loss against the number of pairs."""
    ridge, rates = tune(options.features, options.heldout)
    found: dict[str, dict[int, list[tuple[float, float]]]] = {}
    seconds: dict[str, list[float]] = {}
    for seed in range(options.seeds):
        z_ND, check_ND = split(options.features, seed, options.heldout)
        points = [len(z_ND) // 16 // BATCH * BATCH * k for k in (1, 2, 4, 8)] + [len(z_ND)]
        for name, make in makers(z_ND.shape[1], len(z_ND), ridge).items():
            estimator, spent = make(rates.get(name, 0.0)), 0.0
            started = time.process_time()
            for seen in stream(estimator, z_ND):
                if seen in points:
                    spent += time.process_time() - started
                    found.setdefault(name, {}).setdefault(seen, []).append(measure(estimator.theta_D, check_ND))
                    started = time.process_time()
            seconds.setdefault(name, []).append(spent)
    heads = [f"{seen} pairs" for seen in found["mle"]]
    for column, title in enumerate(("accuracy on held-out pairs", "loss on held-out pairs, nats")):
        rows = {
            name: [interval([each[column] for each in by_seen[seen]]) for seen in by_seen]
            for name, by_seen in found.items()
        }
        for name in rows if column == 0 else ():
            rows[name].append(f"{statistics.median(seconds[name]):.2f}")
        print_table(title, heads + (["seconds"] if column == 0 else []), rows)


def active(options: argparse.Namespace) -> None:
    """Accuracy and loss at equal labels, by what is asked."""
    ridge, _ = tune(options.features, options.heldout)
    found: dict[str, dict[int, list[tuple[float, float]]]] = {}
    for seed in range(options.seeds):
        z_ND, check_ND = split(options.features, seed, options.heldout)
        if options.user:
            z_ND, check_ND = relabel(z_ND, check_ND, options, seed)
        for by in SCORES:
            estimator, labels = Omd(z_ND.shape[1], damping=ridge), 0
            chance = torch.Generator().manual_seed(seed)
            for z_BD in z_ND.split(POOL):
                queries = Queries(z_BD @ estimator.theta_D, z_BD, estimator.curvature, chance)
                asked = top_share(queries.scores(by), 0.25)
                estimator.step(z_BD[asked])
                labels += len(asked)
                if labels in (72, 152) or labels == len(z_ND) // 4:
                    found.setdefault(by, {}).setdefault(labels, []).append(measure(estimator.theta_D, check_ND))
    heads = [f"{labels} labels" for labels in found["random"]]
    for column, title in enumerate(("accuracy on held-out pairs", "loss on held-out pairs, nats")):
        rows = {
            by: [interval([each[column] for each in seen]) for seen in values.values()] for by, values in found.items()
        }
        print_table(title, heads, rows)
    gains = {
        by: [
            interval([one[0] - other[0] for one, other in zip(values[labels], found["random"][labels], strict=True)])
            for labels in values
        ]
        for by, values in found.items()
        if by != "random"
    }
    print_table("accuracy minus that of `random`, paired by seed", heads, gains)


def relabel(z_ND: Tensor, check_ND: Tensor, options: argparse.Namespace, seed: int) -> tuple[Tensor, Tensor]:
    """The pairs as the simulated user labels them, by Bradley-Terry in training and without noise where they are held out."""
    utility_R, index_N2 = simulated_utility(options.user)
    margins_N = utility_R[index_N2[:, 0]] - utility_R[index_N2[:, 1]]
    order = torch.randperm(len(margins_N), generator=torch.Generator().manual_seed(1000 + seed))
    check_N, train_N = margins_N[order[: options.heldout]], margins_N[order[options.heldout :]]
    chance = torch.Generator().manual_seed(20_000 + seed)
    first_N = torch.rand(len(train_N), dtype=torch.float64, generator=chance) < torch.sigmoid(train_N)
    return torch.where(first_N[:, None], z_ND, -z_ND), check_ND * check_N.sign()[:, None]


def simulated_utility(path: Path) -> tuple[Tensor, Tensor]:
    """The simulated user's utility of each text (R,), and the texts of each pair (N, 2)."""
    user_RD, index_N2 = read_features(path)
    teacher = Mle(user_RD.shape[1])
    teacher.step(user_RD[index_N2[:, 0]] - user_RD[index_N2[:, 1]])
    utility_R = user_RD @ teacher.theta_D
    return utility_R * (SPREAD / utility_R.std()), index_N2


def deploy(options: argparse.Namespace) -> None:
    """Regret and the quality of the final reward, by what is shown."""
    features_RD, _ = read_features(options.features)
    utility_R, _ = simulated_utility(options.user or options.features)
    features_RD = features_RD / features_RD.square().sum(1).mean().sqrt()
    found: dict[str, list[list[float]]] = {name: [] for name in SELECTORS}
    for seed in range(options.seeds):
        for name in SELECTORS:
            found[name].append(one_deployment(features_RD, utility_R, name, seed, options.rounds))
    heads = [f"regret at {options.rounds // 4}", f"at {options.rounds}", "ratio", "accuracy of the final reward"]
    rows = {
        name: [interval([run[column] for run in runs], digits) for column, digits in enumerate((0, 0, 2, 3))]
        for name, runs in found.items()
    }
    print_table(f"{ARMS} answers a round, {options.rounds} rounds", heads, rows)


def one_deployment(features_RD: Tensor, utility_R: Tensor, name: str, seed: int, rounds: int) -> list[float]:
    """Cumulative regret after a quarter and after all rounds, their ratio, and accuracy on pairs of held-out answers."""
    chance = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(features_RD), generator=chance)
    pool, heldout = order[: len(order) * 4 // 5], order[len(order) * 4 // 5 :]
    user = SimulatedUser(torch.Generator().manual_seed(10_000 + seed))
    deployment = Deployment(Omd(features_RD.shape[1]), make_from_spec("advantage", name, "selector"))
    regret, early = 0.0, 0.0
    for t in range(rounds):
        rows = pool[torch.randperm(len(pool), generator=chance)[:ARMS]]
        first, second = deployment.choose(features_RD[rows], seed, t)
        regret += round_regret(utility_R[rows], first, second)
        deployment.hear(features_RD[rows], first, second, user.prefers_first(utility_R[rows], first, second))
        if t + 1 == rounds // 4:
            early = regret
    predicted = features_RD[heldout] @ deployment.estimator.theta_D
    right = (predicted[:, None] > predicted[None, :]) == (utility_R[heldout][:, None] > utility_R[heldout][None, :])
    upper = torch.triu(torch.ones_like(right), 1)
    return [early, regret, regret / early, float(right[upper].double().mean())]


if __name__ == "__main__":
    main()
