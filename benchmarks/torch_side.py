"""The same cases in PyTorch, on the modules of diffusers' ``FluxTransformer2DModel``: what the benchmarks compare with.

Written for speed within eager PyTorch: tokens that share linears and modulation run together, each group of queries
has one unmasked attention over the keys that it sees, each block is a checkpoint where the other side's is one.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as functional
from diffusers import FluxTransformer2DModel
from diffusers.models.embeddings import apply_rotary_emb
from torch.utils.checkpoint import checkpoint

from benchmarks import cases
from benchmarks.cases import Case

Tensor = torch.Tensor
Adapter = Mapping[str, Tensor]
# NABLA's and OminiControl's linears; written out, so that a mistake on the other side shows.
TARGETS = re.compile(
    r"x_embedder"
    r"|transformer_blocks\.\d+\.(norm1\.linear|attn\.to_q|attn\.to_k|attn\.to_v|attn\.to_out\.0|ff\.net\.2)"
    r"|single_transformer_blocks\.\d+\.(norm\.linear|proj_mlp|proj_out|attn\.to_q|attn\.to_k|attn\.to_v)"
)


def _rotate(x: Tensor, table: tuple[Tensor, ...]) -> Tensor:
    # Its annotation takes a tuple of one.
    rotate: Any = apply_rotary_emb
    rotated: Tensor = rotate(x, table, sequence_dim=1)
    return rotated


class Side:
    """A case with its frozen transformer and its adapter, whose matrices require gradients."""

    def __init__(self, case: Case, device: str, dtype: torch.dtype, *, remat: bool, compiled: bool) -> None:
        self.case, self.device, self.dtype, self.remat = case, torch.device(device), dtype, remat
        with torch.device("meta"):
            self.model: Any = FluxTransformer2DModel.from_config(case.transformer)
        for name, parameter in list(self.model.named_parameters()):
            value = torch.from_numpy(cases.weight(name, tuple(parameter.shape))).to(self.device, dtype)
            owner, _, last = name.rpartition(".")
            self.model.get_submodule(owner).register_parameter(last, torch.nn.Parameter(value, requires_grad=False))
        linears = {n: m for n, m in self.model.named_modules() if isinstance(m, torch.nn.Linear)}
        self.names = {module: name for name, module in linears.items()}
        shapes = {n: (m.weight.shape[0], m.weight.shape[1]) for n, m in linears.items() if TARGETS.fullmatch(n)}
        drawn = cases.matrices(shapes, case.rank)
        self.adapter = {n: torch.from_numpy(v).to(self.device).requires_grad_() for n, v in drawn.items()}
        self.double: Any = torch.compile(self._double) if compiled else self._double
        self.single: Any = torch.compile(self._single) if compiled else self._single
        self.tables = self._tables()

    def put(self, data: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
        """Inputs on the device, float32."""
        return {name: torch.from_numpy(value).to(self.device) for name, value in data.items()}

    # ------------------------------------------------------------------------------------------ forward pass

    def velocity(self, data: Mapping[str, Tensor], noisy: Tensor, time: Tensor, guidance: float, bare: bool) -> Tensor:
        """[B, N, C] float32. ``bare`` leaves the adapter out of the noise's own stream."""
        case, model = self.case, self.model
        own = None if case.conditions or bare else self.adapter
        main = self._modulation(time, guidance, data["pooled"])
        streams = [
            (self._linear(model.context_embedder, data["prompt"].to(self.dtype), own), main, own),
            (self._linear(model.x_embedder, self._channels(data, noisy).to(self.dtype), own), main, own),
        ]
        if case.conditions:
            shown = torch.cat([data[f"condition_{i}"] for i in range(case.conditions)], dim=1).to(self.dtype)
            still = self._modulation(torch.zeros_like(time), 1.0, data["pooled"])
            streams.append((self._linear(model.x_embedder, shown, self.adapter), still, self.adapter))
        texts, pictures = case.text, case.grid[0] * case.grid[1]
        x = [stream for stream, _, _ in streams]
        rest: list[Any] = [[m for _, m, _ in streams], [a for _, _, a in streams]]
        for block in model.transformer_blocks:
            x = self._run(self.double, block, x, *rest)
        x = [torch.cat(x[:2], dim=1), *x[2:]]
        rest = [part[1:] for part in rest]
        for block in model.single_transformer_blocks:
            x = self._run(self.single, block, x, *rest)
        out = x[0][:, texts : texts + pictures]
        return self._linear(model.proj_out, model.norm_out(out, main), own).float()

    def _run(self, function: Callable[..., Any], block: Any, *arguments: Any) -> Any:
        if self.remat and torch.is_grad_enabled():
            return checkpoint(function, block, *arguments, use_reentrant=False)
        return function(block, *arguments)

    def _channels(self, data: Mapping[str, Tensor], noisy: Tensor) -> Tensor:
        return torch.cat([noisy, data["masked"], data["mask"]], dim=-1) if self.case.name == "insert" else noisy

    def _modulation(self, time: Tensor, guidance: float, pooled: Tensor) -> Tensor:
        scale = torch.full_like(time, guidance)
        return self.model.time_text_embed(time * 1000, scale * 1000, pooled.to(self.dtype))

    def _linear(self, module: Any, x: Tensor, adapter: Adapter | None) -> Tensor:
        name = self.names[module]
        if adapter is None or f"{name}.lora_A" not in adapter:
            return module(x)
        down = functional.linear(x, adapter[f"{name}.lora_A"].to(x.dtype))
        return module(x) + functional.linear(down, adapter[f"{name}.lora_B"].to(x.dtype))

    def _tables(self) -> list[tuple[Tensor, Tensor]]:
        """Rotary tables of text, noise and all conditions."""
        height, width = self.case.grid
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        grid = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).float()
        text = torch.zeros(self.case.text, 3)
        # The subject is picture 1, the control lies where the noise does.
        shown = [grid + torch.tensor([1.0, 0.0, 0.0]), grid][: self.case.conditions]
        all_ids = [text, grid, *([torch.cat(shown)] if shown else [])]
        return [self.model.pos_embed(ids.to(self.device)) for ids in all_ids]

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.case.size.head))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def _mix(self, q: list[Tensor], k: list[Tensor], v: list[Tensor]) -> list[Tensor]:
        """Text and noise see everything, a condition itself and, unless it is independent, text and noise."""
        own, every = len(q) - (1 if self.case.conditions else 0), (torch.cat(k, dim=1), torch.cat(v, dim=1))
        mixed = list(self._attend(torch.cat(q[:own], dim=1), *every).split([x.shape[1] for x in q[:own]], dim=1))
        if not self.case.conditions:
            return mixed
        parts = [x.chunk(self.case.conditions, dim=1) for x in (q[-1], k[-1], v[-1])]
        found = []
        for queries, keys, values in zip(*parts, strict=True):
            seen = ([], []) if self.case.independent else (k[:own], v[:own])
            found.append(self._attend(queries, torch.cat([*seen[0], keys], 1), torch.cat([*seen[1], values], 1)))
        return [*mixed, torch.cat(found, dim=1)]

    def _double(self, block: Any, x: list[Tensor], tembs: list[Tensor], adapters: list[Adapter | None]) -> list[Tensor]:
        attn, silu, linear = block.attn, functional.silu, self._linear
        q, k, v, mods = [], [], [], []
        for i, (h, temb, adapter) in enumerate(zip(x, tembs, adapters, strict=True)):
            norm = block.norm1 if i else block.norm1_context
            mod = linear(norm.linear, silu(temb), adapter)[:, None].chunk(6, dim=-1)
            h = norm.norm(h) * (1 + mod[1]) + mod[0]
            names = ("to_q", "to_k", "to_v") if i else ("add_q_proj", "add_k_proj", "add_v_proj")
            queries, keys, values = (self._heads(linear(getattr(attn, name), h, adapter)) for name in names)
            norm_q, norm_k = (attn.norm_q, attn.norm_k) if i else (attn.norm_added_q, attn.norm_added_k)
            q.append(_rotate(norm_q(queries), self.tables[i]))
            k.append(_rotate(norm_k(keys), self.tables[i]))
            v.append(values)
            mods.append(mod)
        out = []
        for i, (h, mixed) in enumerate(zip(x, self._mix(q, k, v), strict=True)):
            adapter, (_, _, gate, shift, scale, gate_mlp) = adapters[i], mods[i]
            project, norm, ff = (
                (attn.to_out[0], block.norm2, block.ff)
                if i
                else (attn.to_add_out, block.norm2_context, block.ff_context)
            )
            h = h + gate * linear(project, mixed, adapter)
            inner = ff.net[0](norm(h) * (1 + scale) + shift)
            out.append(h + gate_mlp * linear(ff.net[2], inner, adapter))
        return out

    def _single(self, block: Any, x: list[Tensor], tembs: list[Tensor], adapters: list[Adapter | None]) -> list[Tensor]:
        attn, silu, linear = block.attn, functional.silu, self._linear
        joined = tuple(torch.cat(parts) for parts in zip(*self.tables[:2], strict=True))
        q, k, v, inner, gates = [], [], [], [], []
        for h, temb, adapter, table in zip(x, tembs, adapters, [joined, *self.tables[2:]], strict=True):
            shift, scale, gate = linear(block.norm.linear, silu(temb), adapter)[:, None].chunk(3, dim=-1)
            h = block.norm.norm(h) * (1 + scale) + shift
            inner.append(block.act_mlp(linear(block.proj_mlp, h, adapter)))
            queries, keys, values = (self._heads(linear(m, h, adapter)) for m in (attn.to_q, attn.to_k, attn.to_v))
            q.append(_rotate(attn.norm_q(queries), table))
            k.append(_rotate(attn.norm_k(keys), table))
            v.append(values)
            gates.append(gate)
        mixed = self._mix(q, k, v)
        return [
            h + gate * linear(block.proj_out, torch.cat([m, hidden], dim=2), adapter)
            for h, gate, m, hidden, adapter in zip(x, gates, mixed, inner, adapters, strict=True)
        ]

    # -------------------------------------------------------------------------------- training and sampling

    def make_step(self) -> Callable[[Mapping[str, Tensor]], dict[str, float]]:
        """One training step: loss, gradients, clipping, AdamW; gives the loss and the gradients' norm."""
        matrices = list(self.adapter.values())
        optimizer = torch.optim.AdamW(matrices, lr=cases.LEARNING_RATE, weight_decay=0.0)

        def step(data: Mapping[str, Tensor]) -> dict[str, float]:
            time = data["time"][:, None, None]
            noisy = (1 - time) * data["x0"] + time * data["x1"]
            found = self.velocity(data, noisy, data["time"], 1.0, bare=False)
            loss = (found - (data["x1"] - data["x0"])).square().mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_([m for m in matrices if m.grad is not None], cases.CLIP)
            optimizer.step()
            return {"loss": loss.item(), "grad_norm": norm.item()}

        return step

    def sample(self, data: Mapping[str, Tensor], levels: np.ndarray) -> Tensor:
        """Euler's method from ``x1``, the conditions in every step: [B, N, C] float32."""
        state = data["x1"]
        with torch.inference_mode():
            for now, following in zip(levels[:-1].tolist(), levels[1:].tolist(), strict=True):
                time = torch.full((len(state),), now, device=self.device)
                bare = self.case.name == "plain"
                state = state + (following - now) * self.velocity(data, state, time, cases.GUIDANCE, bare)
        return state
