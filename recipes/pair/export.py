"""Write a checkpoint as a Hugging Face folder: bf16 safetensors, configuration, tokenizer.

python -m pair.export --checkpoint target.pt --tokenizer tokenizer.json --out FOLDER
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from pair.model import Config, Model
from pair.tokenizer import END_OF_TEXT
from pair.train import load_model


def model_config(config: Config, end: int) -> dict:
    """``config.json`` of a Qwen3 model of these sizes."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": end,
        "eos_token_id": end,
        "pad_token_id": end,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.width,
        "initializer_range": 0.02,
        "intermediate_size": config.hidden,
        "max_position_embeddings": config.positions,
        "num_attention_heads": config.heads,
        "num_hidden_layers": config.layers,
        "num_key_value_heads": config.kv_heads,
        "rms_norm_eps": config.eps,
        "rope_scaling": None,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": config.vocab,
    }


def export(model: Model, tokenizer: Tokenizer, out: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write everything that ``from_pretrained`` needs into ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    weights = {f"model.{name}": p.detach().to(dtype).contiguous() for name, p in model.state_dict().items()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    end = tokenizer.token_to_id(END_OF_TEXT)
    config = model_config(model.config, end) | {"torch_dtype": str(dtype).removeprefix("torch.")}
    generation = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end, "do_sample": False}
    names = dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT)
    loading = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model.config.positions,
        "clean_up_tokenization_spaces": False,
    }
    for name, content in (
        ("config.json", config),
        ("generation_config.json", generation),
        ("tokenizer_config.json", loading | names),
    ):
        (out / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (out / "tokenizer.json").write_text(tokenizer.to_str(pretty=False), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    export(load_model(args.checkpoint), Tokenizer.from_file(str(args.tokenizer)), args.out)
    print(f"{sum(p.stat().st_size for p in args.out.iterdir()):,} bytes in {args.out}")


if __name__ == "__main__":
    main()
