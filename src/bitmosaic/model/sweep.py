"""Running a model block by block over calibration samples, forward and backward.

Only one decoder block is in memory at a time. The forward sweep keeps the inputs of each block; the
backward sweep takes the gradient of each sample's loss from the last block to the first, running
each block once more from its kept inputs:

    embed ─▶ inputs(0) ─forward(0)─▶ inputs(1) ─ … ─forward(n-1)─▶ inputs(n) ─loss_gradients─▶ dL/dx
                │                       │                                                        │
                └─────── backward(0) ◀──┴──────────── … ◀── backward(n-1) ◀──────────────────────┘

What surrounds the blocks (embeddings, masks, positions, final norm, head) is never rebuilt here:
the model's own forward runs, with its blocks replaced by stubs that record how they are called.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bitmosaic.formats.base import UnsupportedError
from bitmosaic.model.hooks import (
    Observer,
    OnGradient,
    gradients_handed,
    input_gradients_handed,
    observed,
)
from bitmosaic.model.kept import KeptStates
from bitmosaic.model.loss import loss_gradient
from bitmosaic.model.source import Source
from bitmosaic.model.stub import (
    BlockReachedError,
    Call,
    Stub,
    equal,
    hidden_of,
    install_stubs,
    pass_on,
    wrap_like,
)


class Sweep:
    """Calibration samples on their way through the blocks of a model.

    `memory_cap` bounds the bytes of kept block inputs and gradients in memory; what exceeds it goes
    to nameless files in `directory` (default: the system's directory for temporary files). Where
    the states lie changes no bit of any result.
    """

    def __init__(
        self,
        source: Source,
        tokens: Tensor,
        *,
        dtype: torch.dtype = torch.float32,
        memory_cap: int | None = None,
        directory: Path | None = None,
        device: torch.device | None = None,
    ) -> None:
        """Take the samples, token ids [samples, tokens]; nothing runs yet.

        Blocks must be given on `device`; None is that of the source.
        """
        if tokens.dim() != 2 or tokens.dtype != torch.int64 or min(tokens.shape) < 1:
            raise ValueError(
                "Calibration tokens must be int64 of shape (samples, tokens), "
                f"not {tokens.dtype} of shape {tuple(tokens.shape)}. Cut the text into windows."
            )
        if tokens.shape[1] < 2:
            raise ValueError(
                "A calibration sample must have at least 2 tokens, since each predicts the next, "
                f"not {tokens.shape[1]}. Use longer windows."
            )
        if memory_cap is not None and memory_cap < 0:
            raise ValueError(
                f"memory_cap must be a number of bytes or None, not {memory_cap!r}. "
                "Use 0 for files only."
            )
        self.source = source
        self.device = device or source.device
        self.tokens = tokens
        self.dtype = dtype
        self._memory_cap = memory_cap
        self._directory = directory
        self._calls: list[Call] = []
        self._wrap: Callable[[Tensor], Any] = pass_on
        self._shape: tuple[int, int, int] | None = None
        self._inputs: dict[int, KeptStates] = {}
        self._gradients: KeptStates | None = None
        self._gradient_index = -1

    def __enter__(self) -> Sweep:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release all kept states."""
        for index in list(self._inputs):
            self._drop_inputs(index)
        if self._gradients is not None:
            self._gradients.release()
            self._gradients = None

    @property
    def block_count(self) -> int:
        """How many decoder blocks the model has."""
        return len(self.source.block_names)

    @torch.no_grad()
    def embed(self) -> None:
        """Run all that comes before the blocks; keep what block 0 gets and how blocks are called.

        Raises UnsupportedError for a model whose blocks are called differently from sample to
        sample, or that hands state from block to block beside the hidden states.
        """
        self._check_vocabulary()
        none = torch.empty(0, dtype=torch.int64)
        rest = self.source.load_rest(
            self.dtype, tokens=self.tokens, logits_of=none, device=self.device
        )
        stubs = install_stubs(rest, self.source.block_names)
        wrap = self._learn_return(rest, stubs)
        for stub in stubs:
            stub.wrap = wrap
        stubs[-1].stops = True  # what follows the blocks is not wanted here, least of all logits
        kept: KeptStates | None = None
        for sample, window in enumerate(self.tokens):
            with suppress(BlockReachedError):
                rest(input_ids=window[None].to(self.device), use_cache=False)
            calls = [stub.recorded() for stub in stubs]
            hidden = stubs[0].hidden
            if kept is None:
                self._wrap, self._calls = wrap, calls
                self._shape = (len(self.tokens), hidden.shape[1], hidden.shape[2])
                kept = self._new_states()
            elif not equal(calls, self._calls):
                raise UnsupportedError(
                    f"{type(rest).__name__} must call its blocks alike for all samples of one "
                    f"length, but sample {sample} differs from sample 0. It passes values that "
                    "depend on the tokens to its blocks and cannot be streamed yet."
                )
            kept.write(sample, hidden)
        assert kept is not None  # there is at least one sample
        self._keep_inputs(0, kept)

    def inputs(self, index: int) -> KeptStates:
        """Return the kept inputs of a block, one [1, tokens, hidden] a sample.

        `inputs(block_count)` are the outputs of the last block.
        """
        if index not in self._inputs:
            raise ValueError(
                f"The inputs of block {index} must be kept to be read, and only those of "
                f"{sorted(self._inputs)} are. Run embed and forward up to it, with keep_inputs."
            )
        return self._inputs[index]

    def restore_inputs(self, index: int, states: Tensor) -> None:
        """Set the inputs of a block to a saved `inputs(index).stacked()`, to resume there."""
        self._keep_inputs(index, self._copied(states, f"The inputs of block {index}"))

    @torch.no_grad()
    def forward(
        self,
        index: int,
        block: nn.Module,
        *,
        observe: Mapping[str, Observer] | None = None,
        keep_inputs: bool = True,
    ) -> None:
        """Run one block on all samples; its outputs are the inputs of the next.

        `observe` maps names of linears in the block to callbacks that get (sample, x [tokens, in])
        for what reaches them. `keep_inputs` False gives the inputs up after the run, where no
        backward sweep will need them.
        """
        inputs = self.inputs(index)
        outputs = self._new_states()
        for sample, hidden in enumerate(inputs):
            with observed(block, sample, observe or {}):
                outputs.write(sample, self.run(index, block, hidden))
        self._keep_inputs(index + 1, outputs)
        if not keep_inputs:
            self._drop_inputs(index)

    def subset(self, samples: Sequence[int]) -> Sweep:
        """Return a sweep of some of the samples, whose inputs of block 0 must still be kept."""
        part = Sweep(
            self.source,
            self.tokens[list(samples)],
            dtype=self.dtype,
            memory_cap=self._memory_cap,
            directory=self._directory,
            device=self.device,
        )
        inputs = self.inputs(0)
        part._calls, part._wrap = self._calls, self._wrap
        part._shape = (len(samples), *inputs.shape[1:])
        states = part._new_states()
        for place, sample in enumerate(samples):
            states.write(place, inputs[sample])
        part._keep_inputs(0, states)
        return part

    def loss_gradients(self, teacher: Callable[[int], Tensor] | None = None) -> Tensor:
        """Start the backward sweep with dL_s/dx at the output of the last block.

        L_s is the mean next-token cross-entropy of sample s, in float32 or wider; with `teacher`,
        which gives a sample's hidden states [1, tokens, hidden] at the same place of another model
        with the same head, it is the mean KL(teacher || model) of the same positions. Returns the
        losses, float64 [samples]. The outputs of the last block are given up.
        """
        outputs = self.inputs(self.block_count)
        rest = self.source.load_rest(self.dtype, tokens=self.tokens, device=self.device)
        stubs = install_stubs(rest, self.source.block_names)
        for stub in stubs:
            stub.wrap = self._wrap
        gradients = self._new_states()
        losses = torch.zeros(len(outputs), dtype=torch.float64)
        for sample, hidden in enumerate(outputs):
            target = None if teacher is None else teacher(sample)
            losses[sample], gradient = loss_gradient(
                rest, stubs[-1], self.tokens[sample].to(self.device), hidden, target
            )
            gradients.write(sample, gradient)
        self._set_gradients(self.block_count, gradients)
        self._drop_inputs(self.block_count)
        return losses

    def backward(
        self,
        index: int,
        block: nn.Module,
        on_gradient: OnGradient,
        *,
        observe: Mapping[str, Observer] | None = None,
        keep_inputs: bool = False,
    ) -> None:
        """Take every sample's gradient back through one block.

        `on_gradient(name, sample, gradient)` gets dL_s/dW [out, in] of each linear, in float32 or
        wider, as soon as it is complete; it is freed on return. A linear that no token reached,
        as in an unrouted expert, gives no call. `observe` maps names of linears to callbacks that
        get (sample, dL_s/dx [tokens, in]) of the input x that the linear reads, summed over all
        that read it. The block's kept inputs are given up at the end, unless `keep_inputs`; if
        the run is broken off before, the state stays that of before the call.
        """
        if self._gradients is None or self._gradient_index != index + 1:
            raise ValueError(
                f"The backward sweep must go from the last block to the first, so block {index} "
                f"cannot follow on gradients at block {self._gradient_index}. Run loss_gradients "
                "and the blocks after it first."
            )
        inputs = self.inputs(index)
        before = self._new_states()
        for sample, hidden in enumerate(inputs):
            hidden.requires_grad_()
            with (
                gradients_handed(block, sample, on_gradient),
                input_gradients_handed(block, sample, observe or {}),
                torch.enable_grad(),
            ):
                output = self.run(index, block, hidden)
                torch.autograd.backward(output, self._gradients[sample])
            assert hidden.grad is not None
            before.write(sample, hidden.grad)
        self._set_gradients(index, before)
        if not keep_inputs:
            self._drop_inputs(index)

    @torch.no_grad()
    def replay(self, index: int, block: nn.Module, observe: Mapping[str, Observer]) -> None:
        """Run one block once more for what reaches its linears; give its kept inputs up."""
        for sample, hidden in enumerate(self.inputs(index)):
            with observed(block, sample, observe):
                self.run(index, block, hidden)
        self._drop_inputs(index)

    @property
    def gradients(self) -> dict[str, Tensor]:
        """The state of the backward sweep between two blocks, to be saved and set again.

        `index` is the block whose inputs `states` [samples, tokens, hidden] are the gradients of.
        To resume: embed, forward (or `restore_inputs`) up to the block before `index`, set this.
        """
        if self._gradients is None:
            raise ValueError("The backward sweep must have begun. Run loss_gradients first.")
        index = torch.tensor([self._gradient_index], dtype=torch.int64)
        return {"index": index, "states": self._gradients.stacked()}

    @gradients.setter
    def gradients(self, state: Mapping[str, Tensor]) -> None:
        index = int(state["index"])
        if not 0 <= index <= self.block_count:
            raise ValueError(
                f"Gradients must belong to a block within 0 and {self.block_count}, not {index}. "
                "They are of another model; run the backward sweep again."
            )
        self._set_gradients(index, self._copied(state["states"], "Saved gradients"))

    def run(self, index: int, block: nn.Module, hidden: Tensor) -> Tensor:
        """Run a block on hidden states [1, tokens, hidden] with the arguments its model passes."""
        call = self._calls[index]
        return hidden_of(block(hidden, *call.arguments, **call.keywords))

    def _learn_return(self, rest: PreTrainedModel, stubs: list[Stub]) -> Callable[[Tensor], Any]:
        """Run block 0 really, once: stubs must return what blocks return, a tensor or a tuple."""
        stubs[0].stops = True
        with suppress(BlockReachedError):
            rest(input_ids=self.tokens[:1].to(self.device), use_cache=False)
        stubs[0].stops = False
        hidden, call = stubs[0].hidden, stubs[0].recorded()
        block = self.source.load_block(0, self.dtype, device=self.device)
        output = block(hidden.clone(), *call.arguments, **call.keywords)
        if hidden.dim() != 3 or hidden_of(output).shape != hidden.shape:
            raise UnsupportedError(
                "A decoder block must take and return hidden states of one shape (1, tokens, "
                f"hidden), not {tuple(hidden.shape)} and {tuple(hidden_of(output).shape)}. "
                "This architecture cannot be streamed yet."
            )
        return wrap_like(output)

    def _check_vocabulary(self) -> None:
        size = self.source.skeleton.get_input_embeddings().weight.shape[0]
        smallest, largest = int(self.tokens.min()), int(self.tokens.max())
        if smallest < 0 or largest >= size:
            raise ValueError(
                f"Calibration tokens must be within 0 and {size - 1}, "
                f"not {smallest} and {largest}. Use the tokenizer of this model."
            )

    def _new_states(self) -> KeptStates:
        """Reserve room for one state of every sample, in memory as far as the cap allows."""
        if self._shape is None:
            raise ValueError("The samples must be embedded first. Run embed.")
        size = math.prod(self._shape) * self.dtype.itemsize
        used = sum(states.bytes_in_memory for states in self._inputs.values())
        if self._gradients is not None:
            used += self._gradients.bytes_in_memory
        in_memory = self._memory_cap is None or used + size <= self._memory_cap
        return KeptStates(
            self._shape,
            self.dtype,
            in_memory=in_memory,
            directory=self._directory,
            device=self.device,
        )

    def _copied(self, states: Tensor, what: str) -> KeptStates:
        """Keep saved states, which must be those of these samples and this model."""
        result = self._new_states()
        if tuple(states.shape) != result.shape or states.dtype != result.dtype:
            raise ValueError(
                f"{what} must be {result.dtype} of shape {result.shape}, "
                f"not {states.dtype} of shape {tuple(states.shape)}. They are of another run."
            )
        for sample, state in enumerate(states):
            result.write(sample, state)
        return result

    def _keep_inputs(self, index: int, states: KeptStates) -> None:
        self._drop_inputs(index)
        self._inputs[index] = states

    def _drop_inputs(self, index: int) -> None:
        if index in self._inputs:
            self._inputs.pop(index).release()

    def _set_gradients(self, index: int, states: KeptStates) -> None:
        if self._gradients is not None:
            self._gradients.release()
        self._gradients, self._gradient_index = states, index
