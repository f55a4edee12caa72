"""A role's model with the heads its outputs need: one forward pass of the body, then only the states that are asked for.

Available outputs are those of `models.heads.outputs`, and those that plugins add (`contract.outputs`).

A role that gives log-probabilities, or is sampled, is a causal language model. One that gives only values or scores is
the sequence classifier of the same architecture, whose head `score` gives them: it saves and loads as such, a reward model
is an ordinary `AutoModelForSequenceClassification`, and a critic can start from one. Any further scalar head, and the head
of an architecture that transformers has no classifier for, is the module's own and is kept in `heads.safetensors`.

Dropout is switched off: log-probabilities that are compared must come from the same function.

With adapters (`models.lora`) only they and the heads are trained, and only what is trained is in a checkpoint.

Left out on purpose: padding masks (`models.inputs.arrange`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_core.contract.outputs import Output
from rlhf_core.contract.requirements import LANGUAGE, ROUTER_LOSS
from rlhf_core.errors import OptionError, UsageError, option
from rlhf_core.models.ema import Average
from rlhf_core.models.heads.compare import Comparison
from rlhf_core.models.heads.modules import SCALAR, ChunkedHead
from rlhf_core.models.heads.outputs import CORE, ModelStates, check_output, scatter_tokens
from rlhf_core.models.heads.router import balance_loss
from rlhf_core.models.inputs.arrange import Inputs
from rlhf_core.models.inputs.features import Features, trains_only_heads
from rlhf_core.models.inputs.packed_attention import uses_flash, varlen_obstacle
from rlhf_core.models.inputs.packing import pack_rows
from rlhf_core.models.inputs.sequence import SequenceShards
from rlhf_core.models.inputs.vision import Vision
from rlhf_core.models.lora import Adapters, dequantize

__all__ = ["RoleModule"]

Joined = Callable[[Tensor, Tensor], Tensor]
"""(a parameter, this rank's share of a tensor like it) -> the whole tensor"""


class RoleModule(nn.Module):
    """A Hugging Face model and a role's heads.

    Args:
        model: causal language model or sequence classifier, its heads already a `ChunkedHead` or `ScalarHead`.
        heads: heads that are not part of it, by name; those of plugins' outputs by the output's.
        compute_dtype: what the forward pass computes in; a strategy casts to it where the weights are wider.
        adapters: those inside `model`, if it has any.
        packing: whether attention can keep packed rows apart (`models.inputs.packing.can_pack`).
        vision: how the model takes images, if it does.
        outputs: those that plugins bring, by name.
    """

    model: Any

    def __init__(
        self,
        model: Any,
        heads: Mapping[str, nn.Module],
        compute_dtype: torch.dtype = torch.float32,
        adapters: Adapters | None = None,
        packing: bool = False,
        vision: Vision | None = None,
        outputs: Mapping[str, Output] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.heads = nn.ModuleDict(dict(heads))
        self.compute_dtype = compute_dtype
        self.adapters = adapters
        self.comparisons: dict[str, Comparison] = {}
        """outputs that are functions of this role's and another's distributions, by name; see `LocalRole.bind_comparisons`"""
        self.outputs: Mapping[str, Output] = {**CORE, **(outputs or {})}
        self.packing = packing
        self.vision = vision
        self._features = Features()
        self.frozen: dict[str, int] = {}
        """number of parameters that each pattern of `freeze` matches"""
        self.average: Average | None = None
        self.sequence: SequenceShards | None = None
        """the ranks that share each row, where a strategy cuts rows"""
        self.sharded = False
        """True if ranks hold shares of the parameters, and so must call the body together (`Trainable.sharded`)"""

    @property
    def causal_lm(self) -> Any:
        """The Hugging Face causal language model inside; what a rollout engine samples from."""
        assert isinstance(self.model.get_output_embeddings(), ChunkedHead), "this role has no language-model head"
        return self.model

    def scalar_head(self, name: str) -> nn.Module:
        """The head called `name`: the module's own, or else the classifier's."""
        return self.heads[name] if name in self.heads else self.model.score  # noqa: SIM401  a ModuleDict has no `get`

    def keep_features(self, folder: str) -> None:
        """Keep the states of the frozen body in a folder, for other runs.

        Raises:
            OptionError: the body is not frozen.
        """
        from rlhf_core.models.inputs.feature_store import FeatureStore, body_digest

        body = self.model.base_model
        if not trains_only_heads(self, body):
            raise OptionError(
                "features",
                f"{folder} stores states of a frozen body, but the body is trained; {option('freeze', 'body')} "
                "freezes it",
            )
        self._features.digest = lambda: body_digest(body, self.compute_dtype)
        self._features.store = FeatureStore(folder)

    def forward(self, inputs: Inputs, names: frozenset[str]) -> dict[str, Tensor]:
        """The outputs of these names, float32, zero outside the completions."""
        if self.sequence is not None:
            return self._forward_stretch(self.sequence, inputs, names)
        states, states_M, last_N, balance = self._states(inputs, names)
        outputs: dict[str, Tensor] = {}
        if balance is not None:
            outputs[ROUTER_LOSS] = balance
        given = ModelStates(states, states_M, last_N, inputs, self._language_head, "entropy_NT" in names)
        for name, output in self.outputs.items():
            if name in names:
                outputs[name] = check_output(name, output, output(given, self._head_of(name)), inputs)
        for name in names & self.comparisons.keys():
            values_M = self.comparisons[name](self._language_head(), states.index_select(0, states_M), inputs)
            outputs[name] = scatter_tokens(values_M, inputs)
        return {name: outputs[name] for name in names}

    def _forward_stretch(self, ranks: SequenceShards, inputs: Inputs, names: frozenset[str]) -> dict[str, Tensor]:
        """Return the outputs of whole rows, of which this rank computes a stretch."""
        whole = sorted(names - CORE.keys())
        if whole or inputs.images or inputs.ends_R is not None:
            what = f"the output {whole[0]}" if whole else "rows with images or segments"
            raise UsageError(f"{what} cannot be computed while ranks share each row; give each rank its own rows")
        stretch = ranks.cut(*pack_rows(inputs))
        states, own = self._run_body(stretch.arguments)[0].flatten(0, 1), stretch.inputs
        given = ModelStates(states, own.states_M, own.last_N, own, self._language_head, "entropy_NT" in names)
        outputs: dict[str, Tensor] = {}
        for name in sorted(names):  # in one order on all ranks
            output = self.outputs[name]
            values = check_output(name, output, output(given, self._head_of(name)), own)
            if output.last_only:
                values = torch.where(stretch.own_N.view(-1, *[1] * (values.dim() - 1)), values, 0.0)
            outputs[name] = ranks.add_up(values, states)
        return outputs

    def _language_head(self) -> ChunkedHead:
        """The language-model head."""
        head: ChunkedHead = self.causal_lm.get_output_embeddings()
        return head

    def _head_of(self, name: str) -> nn.Module | None:
        """The head of an output, if it has one."""
        if name in SCALAR:
            return self.scalar_head(SCALAR[name])
        return self.heads[name] if name in self.heads else None  # noqa: SIM401  a ModuleDict has no `get`

    def states_of(self, inputs: Inputs) -> Tensor:
        """The states that predict completion tokens (M, H)."""
        states, states_M, *_ = self._states(inputs, LANGUAGE)
        return states.index_select(0, states_M)

    def _states(self, inputs: Inputs, names: frozenset[str]) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return what `_read` returns, and cache it per row if only heads are trained."""
        body, routed = self.model.base_model, ROUTER_LOSS in names
        split = inputs.ends_R is not None
        if routed or inputs.images or split or self.sharded or not trains_only_heads(self, body):
            return self._read(inputs, routed)
        tokens = any(name not in self.outputs or not self.outputs[name].last_only for name in names)
        return *self._features(inputs, tokens, body.parameters(), self._read), None

    def _read(self, inputs: Inputs, routed: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Last hidden states of all rows (cells, H); of which cells predict completion tokens (M,); rows' last cells (N,);
        and the routers' auxiliary loss if `routed`.

        No attention mask: rows are packed, or padding is on the right, where nothing real can see it.
        """
        inputs = self.vision.read(inputs) if self.vision is not None else inputs
        arguments: dict[str, Any] = {"input_ids": inputs.ids_NS}
        if inputs.images:
            arguments |= self._image_input.arguments(inputs.images, self.model)
        elif self.packs and len(inputs.ids_NS):
            rows, inputs = pack_rows(inputs)
            arguments = rows.arguments(self.flash)
        if routed:
            arguments["output_router_logits"] = True
        found = self._run_body(arguments)
        padded = None if "position_ids" in arguments else inputs
        balance = balance_loss(self.model, found.router_logits, padded) if routed else None
        return found[0].flatten(0, 1), inputs.states_M, inputs.last_N, balance

    def _run_body(self, arguments: Mapping[str, Any]) -> Any:
        """Return the body's output, with its layers computed again in the backward pass where that is wanted."""
        body = self.model.base_model
        if self.adapters is not None:
            self.adapters.drop(self.model, torch.is_grad_enabled())
        recompute = self.model.is_gradient_checkpointing and torch.is_grad_enabled()
        if recompute:
            body.train()  # transformers recomputes in training mode only; dropout is off in both
        found = body(use_cache=False, **arguments)
        if recompute:
            body.eval()
            if self.adapters is not None:
                self.adapters.drop(
                    self.model, True
                )  # when its layers are computed again their dropout must draw, and draw the same
        return found

    @property
    def _image_input(self) -> Vision:
        """Return the model's image inputs, for rows that have images."""
        if self.vision is None:
            raise UsageError(
                f"{self.model.config.name_or_path} reads only text, but rows have images; pass another model"
            )
        return self.vision

    @property
    def packs(self) -> bool:
        """Return True if a forward pass computes no padding (`models.inputs.packing`).

        Without a kernel for it on an accelerator, one call per row would cost more than the padding of rows of similar length.
        """
        if not self.packing:
            return False
        device = self.model.device
        text = self.model.config.get_text_config(decoder=True)
        return device.type == "cpu" or self.flash or not varlen_obstacle(text, device, self.compute_dtype)

    @property
    def flash(self) -> bool:
        """Return True if attention is flash attention of a package or the hub, not torch's own, which `sdpa` uses."""
        return uses_flash(self.model.config.get_text_config(decoder=True))

    def hf_weights(
        self, full: Callable[[Tensor], Tensor] = torch.Tensor.detach, joined: Joined | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield the model's tensors under their Hugging Face names, each once: of tied ones the first, the embedding.

        Adapters are merged into a copy of the matrix they belong to.

        Args:
            full: the whole of a parameter; `Trainable.full` of a strategy that shards. Every rank calls it for every parameter.
            joined: the whole of a parameter's moving average, from the parameter and this rank's share of the average;
                `Trainable.join_shares`. It gives the averages in the place of what is trained; None gives the weights.
        """
        adapters = self.adapters or Adapters(None)
        sites = {site.base: site for site in adapters.sites if adapters.on}
        averages = self._averages() if joined else {}
        named = dict(self.model.named_parameters())

        def value(name: str) -> Tensor:
            parameter = named[name]
            if joined and name in averages:
                return joined(parameter, averages[name]).to(parameter.dtype)
            return dequantize(parameter, full(parameter))

        for name in [name for name in named if name not in adapters.names]:
            site = sites.get(name)
            if site is None:
                yield name.replace(".base_layer.", "."), value(name)
                continue
            A, B = value(site.A).clone(), value(site.B).clone()  # they stay when another is gathered
            base = value(name)
            yield f"{site.name}.weight", site.merge(base if named[name].is_floating_point() else base.float(), A, B)
        persistent = self.model.state_dict().keys()
        for name, buffer in self.model.named_buffers():
            if name in persistent:
                yield name, buffer

    def hf_parameters(self) -> dict[str, Tensor]:
        """Return the parameters and saved buffers that `hf_weights` reads, by its names, as the module holds them now."""
        adapters = self.adapters or Adapters(None)
        named = {name: each for name, each in self.model.named_parameters() if name not in adapters.names}
        persistent = self.model.state_dict().keys()
        named |= {name: buffer for name, buffer in self.model.named_buffers() if name in persistent}
        return {name.replace(".base_layer.", "."): tensor for name, tensor in named.items()}

    def own_weights(
        self, full: Callable[[Tensor], Tensor] = torch.Tensor.detach, joined: Joined | None = None
    ) -> dict[str, Tensor]:
        """Return what an export writes in addition to `hf_weights`: heads, and of an adapted model all that is trained.

        Names are those of this module's parameters; the arguments are those of `hf_weights`.
        """
        trained = {f"model.{name}" for name in self.adapters.names} if self.adapters is not None else set()
        scored = "model.score." if self.adapters is not None else "heads."
        averages = self.average.by_name() if self.average is not None else {}
        return {
            name: joined(parameter, averages[name]).to(parameter.dtype)
            if joined and name in averages
            else full(parameter).clone()
            for name, parameter in self.named_parameters()
            if name in trained or name.startswith(("heads.", scored))
        }

    def _averages(self) -> dict[str, Tensor]:
        """Return the moving averages by the names that their parameters have in the model."""
        named = self.average.by_name() if self.average is not None else {}
        return {name.removeprefix("model."): tensor for name, tensor in named.items()}

    @contextmanager
    def without_adapters(self) -> Iterator[None]:
        """Use the model as it was before adapters were trained, inside the context."""
        assert self.adapters is not None, "only a model with adapters has a base"
        with self.adapters.disable(self.model):
            yield

    def scalar_heads(self) -> list[nn.Module]:
        """Return all scalar heads: the module's own, and a classifier's."""
        score = getattr(self.model, "score", None)
        return [*self.heads.values(), *([] if score is None else [score])]

    def state_dict(self, *args: Any, **options: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return the state that a checkpoint needs. Frozen weights are not in it: they are loaded from their source again."""
        kept = self._checkpoint_names()
        state = super().state_dict(*args, **options)
        return {name: value for name, value in state.items() if name in kept}

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Take what `state_dict` gave."""
        kept = self._checkpoint_names()
        if strict and kept != state.keys():
            odd = sorted(kept ^ state.keys())
            raise RuntimeError(f"{len(odd)} tensors are missing or unknown, such as {odd[0]}")
        return super().load_state_dict(state, strict=False, assign=assign)

    def _checkpoint_names(self) -> set[str]:
        """Names of what a checkpoint holds: all of a module that is trained altogether, or not at all."""
        every = super().state_dict().keys()
        named = dict(self.named_parameters(remove_duplicate=False))
        frozen = {name for name, parameter in named.items() if not parameter.requires_grad}
        if not frozen or len(frozen) == len(named):
            return set(every)
        return {name for name in every if name in named or name in dict(self.named_buffers())} - frozen
