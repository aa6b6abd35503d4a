"""Train the embedded model: a small Llama on the standard library of the running Python.

    python tools/train_stdlib_llama.py --output DIR

The corpus is split by the rule of `bitmosaic.evaluation.text.stdlib_documents`, so the held-out
modules are never trained on. The defaults are the recipe of the model that bitmosaic ships (5.8 M
parameters, 7.5 M tokens; 55 minutes on one core). An interrupted run continues where it was saved
last, and ends with the bytes of an uninterrupted one: the order of the data follows from the seed
and the step alone, and the state holds everything else. `--steps 20 --width 32` is a smoke test.
"""

import argparse
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bitmosaic.checkpoint import read_tensors, write_tensors
from bitmosaic.evaluation import perplexity, stdlib_documents, token_windows

BOS, EOS = "<s>", "</s>"
STATE = "training-state.safetensors"


@dataclass(frozen=True)
class Recipe:
    """What is trained and how; the defaults are those of the embedded model."""

    steps: int = 3679
    batch: int = 8
    seqlen: int = 256
    blocks: int = 6
    width: int = 256
    heads: int = 8
    vocabulary: int = 4096
    rate: float = 2e-3
    warmup: int = 100
    seed: int = 0

    def config(self) -> LlamaConfig:
        """Return the model: MLP three times as wide, half as many key-value heads as heads."""
        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            intermediate_size=3 * self.width,
            num_hidden_layers=self.blocks,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads // 2,
            max_position_embeddings=self.seqlen,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=1,
        )

    def rate_at(self, step: int) -> float:
        """Return the learning rate of a step: linear warm-up, then a cosine down to 2 %."""
        if step < self.warmup:
            return self.rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.rate * (0.02 + 0.98 * (1 + math.cos(math.pi * done)) / 2)


def train_tokenizer(documents: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE whose first two tokens are BOS and EOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS)


class Training:
    """A model on its way: parameters, the optimizer's moments, and the step that comes next."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.step = 0
        with torch.random.fork_rng(devices=[]):  # transformers draws from the global generator
            torch.manual_seed(recipe.seed)
            self.model = LlamaForCausalLM(recipe.config())
        self.parameters = dict(self.model.named_parameters())
        matrices = [each for each in self.parameters.values() if each.dim() >= 2]
        vectors = [each for each in self.parameters.values() if each.dim() < 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
            lr=recipe.rate,
            betas=(0.9, 0.95),
        )

    def advance(self, tokens: Tensor) -> float:
        """Take one step on tokens [batch, seqlen] and return the loss in nats a token."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.rate_at(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16):
            logits = self.model(input_ids=tokens[:, :-1], use_cache=False).logits
        loss = functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        return float(loss.detach())

    def save(self, path: Path) -> None:
        """Write everything that the next step depends on."""
        tensors = {f"weight/{name}": each.detach() for name, each in self.parameters.items()}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"{key}/{name}"] = value
        facts = {key: str(value) for key, value in asdict(self.recipe).items()}
        write_tensors(path, tensors, {**facts, "next_step": str(self.step)})

    def load(self, path: Path) -> None:
        """Continue from a saved state of the same recipe."""
        tensors, facts = read_tensors(path)
        for key, value in asdict(self.recipe).items():
            if facts.get(key) != str(value):
                raise ValueError(
                    f"{key} of the saved training must be {value}, not {facts.get(key)}. "
                    "Give the same options again, or another output directory."
                )
        self.step = int(facts["next_step"])
        for stored, tensor in tensors.items():
            kind, _, name = stored.partition("/")
            parameter = self.parameters[name]
            if kind == "weight":
                parameter.data.copy_(tensor)
            else:
                self.optimizer.state[parameter][kind] = tensor


def data_order(windows: int, recipe: Recipe) -> Iterator[Tensor]:
    """Yield the indices of each step's windows: every epoch is a fresh shuffle of all of them."""
    pending = torch.zeros(0, dtype=torch.int64)
    generator = torch.Generator().manual_seed(recipe.seed)
    while True:
        while len(pending) < recipe.batch:
            pending = torch.cat([pending, torch.randperm(windows, generator=generator)])
        yield pending[: recipe.batch]
        pending = pending[recipe.batch :]


def train(
    recipe: Recipe, output: Path, documents: Sequence[str], *, save_every: int = 200
) -> LlamaForCausalLM:
    """Train on documents, saving the state now and then, and write the model to `output`."""
    output.mkdir(parents=True, exist_ok=True)
    if (output / "tokenizer.json").exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(output)
    else:
        tokenizer = train_tokenizer(documents, recipe.vocabulary)
        tokenizer.save_pretrained(output)
    windows = token_windows(tokenizer, documents, recipe.seqlen, bos_each=True)
    training = Training(recipe)
    if (output / STATE).exists():
        training.load(output / STATE)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("training", total=recipe.steps, completed=training.step)
        for step, chosen in zip(
            range(recipe.steps), data_order(len(windows), recipe), strict=False
        ):
            if step < training.step:
                continue
            loss = training.advance(windows[chosen])
            if (step + 1) % save_every == 0:
                training.save(output / STATE)
            progress.update(task, completed=step + 1, description=f"step {step + 1}, {loss:.3f}")
    training.model.to(torch.bfloat16).save_pretrained(output)
    (output / STATE).unlink(missing_ok=True)
    return training.model


def main(arguments: Sequence[str] | None = None) -> None:
    """Train on the standard library and print the perplexity of the held-out modules."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="directory of the model")
    for name, default in asdict(Recipe()).items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    options = vars(parser.parse_args(arguments))
    output = options.pop("output")
    recipe = Recipe(**options)
    began = time.monotonic()
    model = train(recipe, output, stdlib_documents("train"))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(output)
    heldout = token_windows(tokenizer, stdlib_documents("heldout"), recipe.seqlen, bos_each=True)
    result = perplexity(model.float(), heldout)
    print(
        f"{result.perplexity:.2f} perplexity over {result.tokens} held-out tokens, "
        f"{time.monotonic() - began:.0f} s"
    )


if __name__ == "__main__":
    main()
