"""Options that several verbs share, and what they are turned into."""

from dataclasses import dataclass, field
from pathlib import Path

from transformers import GenerationConfig

from controllers import WEIGHTS, make_policy
from tts.acceptance import check_acceptance
from tts.distill.config import DistillConfig
from tts.drafting import Memory, PromptLookup
from tts.errors import UserError
from tts.models import ModelPair, load_pair
from tts.settings import Sampling

WINDOW = 256  # newest positions that a draft reads: best for those that ship
MATCH = 3  # tokens that have to match to be copied beside a draft: after fewer it does better


@dataclass(frozen=True)
class ModelOptions:
    """Which models, and where.

    Args:
        target: alias of a packaged model, local folder, or hub id.
        draft: folder, hub id, prompt_lookup, or a shipped one by name (None: the first, eagle3).
        dtype: bfloat16, float16 or float32.
        device: cpu or cuda.
        compression: of the target's weights: none, int8 or nf4 (see `tts.compression`).
    """

    target: str = "smollm2-135m"
    draft: str | None = None
    dtype: str = "bfloat16"
    device: str = "cpu"
    compression: str = "none"

    def load(self, stock: bool = False) -> ModelPair:
        """The pair; ``stock`` leaves out our attention and packing, as transformers loads it."""
        return load_pair(
            self.target,
            self.draft,
            dtype=self.dtype,
            device=self.device,
            compression=self.compression,
            stock=stock,
        )


@dataclass(frozen=True)
class TextOptions:
    """What is decoded, and how tokens are chosen.

    Args:
        workload: tune, judge, single, tasks, or a JSON file of conversations (see `tts.workload`).
        conversations: decode only the first so many (0: all).
        max_new_tokens: generated tokens a conversation.
        turn_tokens: generated tokens a turn at most.
        temperature: 0 is greedy.
        top_p: nucleus.
        top_k: 0 is off.
        repetition_penalty: 1 is off.
        seed: of the text; each conversation adds its own.
    """

    workload: str = "judge"
    conversations: int = 1
    max_new_tokens: int = 4000
    turn_tokens: int = 320
    temperature: float = 0.8
    top_p: float = 0.95
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "turn_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: {getattr(self, name)} is not positive: use at least 1")
        if self.conversations < 0:
            raise UserError(f"conversations: {self.conversations} is negative: use 0 for all")
        Sampling(self.temperature, self.top_k, self.top_p, 0.0, self.repetition_penalty)

    def generation_config(self, max_new_tokens: int) -> GenerationConfig:
        """For one turn."""
        sampling = {"do_sample": False}
        if self.temperature > 0:
            sampling = {
                "do_sample": True,
                "temperature": self.temperature,
                "top_p": self.top_p,
                "top_k": self.top_k,
            }
        return GenerationConfig(
            max_new_tokens=max_new_tokens,
            repetition_penalty=self.repetition_penalty,
            **sampling,
        )


@dataclass(frozen=True)
class SpeculationOptions:
    """How the draft speculates.

    Args:
        acceptance: greedy, rejection, block or coupled.
        policy: who chooses gamma (`controllers.POLICIES`).
        gamma: speculation length of the fixed policy.
        cap: largest gamma of any other policy (None: its authors' own).
        lookup: tokens that have to match to be copied after, of the arms ``lookup...``.
        window: sliding window over a draft model's context, of all arms but ``static`` and
            ``draft``, which read all of it.
        memory: what the arms ``memory...`` remember of the target's words.
        distill: how the draft learns in the arms that let it.
        draft_updates: False: no arm's draft learns.
        gamma_updates: False: no arm's gamma MLP learns; it stays as it was fitted.
        weights: folder of `tts fit` for the policies that are fitted ("": what ships).
    """

    acceptance: str = "coupled"
    policy: str = "fixed"
    gamma: int = 4
    cap: int | None = None
    lookup: int = MATCH
    window: int = WINDOW
    memory: Memory = field(default_factory=Memory)
    distill: DistillConfig = field(default_factory=DistillConfig)
    draft_updates: bool = True
    gamma_updates: bool = True
    weights: str = ""

    def __post_init__(self) -> None:
        check_acceptance(self.acceptance)
        make_policy(self.policy, gamma=self.gamma, cap=self.cap, weights=self.weights_folder)
        PromptLookup(shortest=self.lookup)  # refuses what is no length
        check_window(self.window)
        if not self.weights_folder.is_dir():
            raise UserError(f"weights: no folder {self.weights!r}: give one of `tts fit`")

    @property
    def weights_folder(self) -> Path:
        """Of the policies that are fitted."""
        return Path(self.weights).expanduser() if self.weights else WEIGHTS


def check_window(window: int) -> None:
    """Raise UserError for a draft's window without a position."""
    if window < 1:
        raise UserError(f"window: {window} sees nothing: use at least 1")


def check_rule(acceptance: str, temperature: float, shared: bool) -> None:
    """Raise UserError if the rule cannot do what a run asks of it.

    Args:
        acceptance: as of `SpeculationOptions`.
        temperature: 0 is greedy, which every rule is then.
        shared: several arms shall have one text, or a recorded one.
    """
    if not temperature:
        return
    if acceptance == "greedy":
        raise UserError("acceptance: greedy is for --temperature 0: set that, or use another rule")
    if shared and acceptance != "coupled":
        raise UserError(
            f"acceptance: under {acceptance} every arm writes another text, and none a recorded "
            "one: use coupled, or one arm without a path"
        )


def writable(path: str, field: str, new: bool = True) -> Path:
    """The file ``path``, its folder made, or a UserError that names ``field``.

    Args:
        path: of a file or folder that is about to be written.
        field: that named it.
        new: it must not exist.
    """
    file = Path(path).expanduser()
    if new and file.exists():
        raise UserError(f"{field}: {file} exists: choose another name")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            file.touch()
            file.unlink()
    except OSError as error:
        raise UserError(
            f"{field}: {file} cannot be written ({error.strerror}): choose another place"
        ) from None
    return file


def readable(path: str, field: str) -> Path:
    """The file ``path``, or a UserError that names ``field``."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"{field}: no file {path!r}: check the path")
    return file
