"""Test-time speculation: lossless speculative decoding that learns while it decodes."""

from importlib import import_module
from typing import Any

_PUBLIC = {
    "Conversation": "tts.conversation",
    "GenerationResult": "tts.engine",
    "Memory": "tts.drafting",
    "ModelPair": "tts.models",
    "Session": "tts.engine",
    "PromptLookup": "tts.drafting",
    "SpeculativeDecoder": "tts.engine",
    "UserError": "tts.errors",
    "DistillConfig": "tts.distill.config",
    "load_pair": "tts.models",
    "load_state": "tts.state",
    "load_target": "tts.models",
    "save_adapter": "tts.state",
    "save_state": "tts.state",
}

__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    """Import on first use: `import tts` alone loads neither torch nor transformers."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'tts' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
