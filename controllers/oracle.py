"""The stop rule that knows the text: what any rule of its kind could reach at best."""

from collections.abc import Sequence

from controllers.plain import Plain
from tts.errors import UserError
from tts.policy import RoundState, Signals


class Oracle(Plain):
    """Draft on while the drafted tokens are those of the recorded path.

    The first mismatch was drafted before it could be seen, so every round costs one token at least.
    """

    def __init__(self, cap: int = 40) -> None:
        super().__init__(cap)
        self._path: Sequence[int] | None = None

    def follow(self, first: int, path: Sequence[int]) -> None:
        """The tokens to come, told before every generation.

        ``path[0]`` will be the generated token number ``first`` of the sequence.
        """
        self._first, self._path = first, path

    def plan(self, state: RoundState) -> int:
        if self._path is None:
            raise UserError(
                "policy: oracle needs the text in advance: give a recorded path, or let another "
                "arm write the text before it"
            )
        return super().plan(state)

    def proceed(self, state: RoundState, signals: Signals) -> bool:
        assert self._path is not None
        return signals.token == self._path[state.position + signals.offset - self._first]
