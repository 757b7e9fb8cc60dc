"""Which draft a thing was trained for."""

import hashlib

from transformers import PreTrainedModel

SAMPLED = 8  # numbers of each parameter


def model_fingerprint(model: PreTrainedModel) -> str:
    """16 hexadecimal digits from the first numbers of every parameter, rounded to bfloat16."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(name.encode())
        first = parameter.detach().flatten()[:SAMPLED].bfloat16().float().cpu()
        digest.update(first.numpy().tobytes())
    return digest.hexdigest()[:16]
