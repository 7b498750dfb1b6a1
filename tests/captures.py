"""What the capture tests share: small random models, and a run of the backend that keeps its captures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import fx

from sparsify import backend
from sparsify.options import Options
from sparsify.passes import Capture

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "max_position_embeddings": 128,
}
GROUPED = SIZES | {"num_key_value_heads": 2}
GPT2 = {"n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 64, "n_positions": 128}
WINDOW = 6
ALTERNATING = {"head_dim": 8, "sliding_window": WINDOW, "num_hidden_layers": 2}
CONFIGS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED),
    "mistral": ("MistralForCausalLM", "MistralConfig", GROUPED | {"sliding_window": WINDOW}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", GROUPED),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", GROUPED | ALTERNATING),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2 | {"bos_token_id": 0, "eos_token_id": 0}),
    "bert": ("BertModel", "BertConfig", SIZES),
}


def model(name: str, attention: str) -> torch.nn.Module:
    """A tiny model with random weights, in eval mode."""
    cls, config, sizes = CONFIGS[name]
    torch.manual_seed(0)
    made = getattr(transformers, config)(**sizes, attn_implementation=attention)
    return getattr(transformers, cls)(made).eval()


@dataclass
class Recorded:
    """A backend that runs the passes, keeps each capture and runs the rewritten graph as it is."""

    options: dict[str, Any] = field(default_factory=dict)
    captures: list[Capture] = field(default_factory=list)

    def __call__(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        capture = backend.captured(gm, example_inputs, Options.read({"target": "null", **self.options}))
        self.captures.append(capture)
        return capture.module.forward

    @property
    def sites(self) -> list[Any]:
        return [site for capture in self.captures for site in capture.sites]


def compiled(function: Any, dynamic: bool | None = None, **options: Any) -> tuple[Callable[..., Any], Recorded]:
    """The function under torch.compile with nothing cached from before, and what was captured."""
    torch._dynamo.reset()
    recorded = Recorded(options)
    return torch.compile(function, backend=recorded, dynamic=dynamic, fullgraph=True), recorded


def square_nodes(capture: Capture, q_len: Any, k_len: Any) -> list[fx.Node]:
    """The nodes of a graph that hold a tensor over queries and keys."""
    found = []
    for node in capture.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.dim() >= 2 and tuple(value.shape[-2:]) == (q_len, k_len):
            found.append(node)
    return found


def traced(function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> Capture:
    """The capture of a plain function under no_grad, whose result is compared with the function's own."""
    with torch.no_grad():
        run, recorded = compiled(function)
        torch.testing.assert_close(run(*inputs), function(*inputs), atol=2e-5, rtol=2e-5)
    (capture,) = recorded.captures
    return capture
