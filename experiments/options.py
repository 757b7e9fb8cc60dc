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
class TargetOptions:
    """Which target, and where.

    Args:
        target: alias of a packaged model, local folder, or hub id.
        dtype: bfloat16, float16 or float32.
        device: cpu or cuda.
    """

    target: str = "smollm2-135m"
    dtype: str = "bfloat16"
    device: str = "cpu"

    def load(
        self, draft: str | None, compression: str = "none", *, stock: bool = False
    ) -> ModelPair:
        """The target and a draft; arguments as of `load_pair`."""
        return load_pair(
            self.target,
            draft,
            dtype=self.dtype,
            device=self.device,
            compression=compression,
            stock=stock,
        )


@dataclass(frozen=True)
class ModelOptions(TargetOptions):
    """Which models, and where.

    Args:
        draft: folder, hub id, prompt_lookup, or a shipped one by name (None: the first, eagle3).
        compression: of the target's weights: none, int8 or nf4 (see `tts.compression`).
    """

    draft: str | None = None
    compression: str = "none"


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are chosen.

    Args:
        temperature: 0 is greedy.
        top_p: nucleus.
        top_k: 0 is off.
        repetition_penalty: 1 is off.
        seed: of the text; each conversation adds its own.
    """

    temperature: float = 0.8
    top_p: float = 0.95
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
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
class AmountOptions(SamplingOptions):
    """How much is decoded.

    Args:
        conversations: decode only the first so many (0: all).
        max_new_tokens: generated tokens a conversation.
    """

    conversations: int = 1
    max_new_tokens: int = 4000

    def __post_init__(self) -> None:
        SamplingOptions.__post_init__(self)
        if self.max_new_tokens < 1:
            raise UserError(
                f"max_new_tokens: {self.max_new_tokens} is not positive: use at least 1"
            )
        if self.conversations < 0:
            raise UserError(f"conversations: {self.conversations} is negative: use 0 for all")


@dataclass(frozen=True)
class TextOptions(AmountOptions):
    """What is decoded.

    Args:
        workload: tune, judge, single, tasks, or a JSON file of conversations, as
            `experiments.workload` has it.
        turn_tokens: generated tokens a turn at most.
    """

    workload: str = "judge"
    turn_tokens: int = 320

    def __post_init__(self) -> None:
        AmountOptions.__post_init__(self)
        if self.turn_tokens < 1:
            raise UserError(f"turn_tokens: {self.turn_tokens} is not positive: use at least 1")


@dataclass(frozen=True)
class LengthOptions:
    """How the policies choose gamma.

    Args:
        cap: largest gamma of any policy that is not fixed (None: its own default).
        gamma_updates: False: no gamma MLP learns; it stays as it was fitted.
        weights: folder of `tts fit` for the policies that are fitted ("": what ships).
    """

    cap: int | None = None
    gamma_updates: bool = True
    weights: str = ""

    def __post_init__(self) -> None:
        make_policy("svip", cap=self.cap)
        if not self.weights_folder.is_dir():
            raise UserError(f"weights: no folder {self.weights!r}: give one of `tts fit`")

    @property
    def weights_folder(self) -> Path:
        """Of the policies that are fitted."""
        return Path(self.weights).expanduser() if self.weights else WEIGHTS


@dataclass(frozen=True)
class PolicyOptions(LengthOptions):
    """Who chooses gamma, and how.

    Args:
        policy: of `controllers.POLICIES`.
        gamma: speculation length of the fixed policy.
    """

    policy: str = "fixed"
    gamma: int = 4

    def __post_init__(self) -> None:
        LengthOptions.__post_init__(self)
        make_policy(self.policy, gamma=self.gamma, cap=self.cap, weights=self.weights_folder)


@dataclass(frozen=True)
class SpeculationOptions:
    """How tokens are drafted and accepted.

    Args:
        acceptance: greedy, rejection, block or coupled.
        lookup: tokens that have to match to be copied after, of the arms ``lookup...``.
        window: sliding window over a draft model's context, of all arms but ``static`` and
            ``draft``, which read all of it.
        memory: what the arms ``memory...`` remember of the target's words.
    """

    acceptance: str = "coupled"
    lookup: int = MATCH
    window: int = WINDOW
    memory: Memory = field(default_factory=Memory)

    def __post_init__(self) -> None:
        check_acceptance(self.acceptance)
        PromptLookup(shortest=self.lookup)  # refuses what is no length
        check_window(self.window)


@dataclass(frozen=True)
class LearningOptions:
    """How drafts learn.

    Args:
        distill: how, in the arms that let them.
        draft_updates: False: no arm's draft learns.
    """

    distill: DistillConfig = field(default_factory=DistillConfig)
    draft_updates: bool = True

    @property
    def learning(self) -> DistillConfig | None:
        """How a draft learns that may (None: none does)."""
        return self.distill if self.draft_updates else None


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
