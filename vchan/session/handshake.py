"""The handshake: who the ends are, which key is in force, and whether their session goes on.

Rules of this file
1. No I/O, no clock, no logging; randomness is handed in.
2. A HELLO is never trusted, only answered: anybody's bytes may have been in the stream.
3. A new key comes into force at the first proof that the peer knows both nonces: a WELCOME that
   echoes ours, or a frame sealed with the new key.
4. The same two instances with a session in common go on from the exact point. Everybody else starts
   a new session at zero.

Both ends send HELLO on a stream that they open, and answer HELLO with WELCOME.
"""

from collections.abc import Callable
from typing import Final, NamedTuple

from vchan.session.contract import MESSAGE_BYTES_MIN, Config, Peer, Role, printable
from vchan.session.receiver import Receiver
from vchan.session.sender import Sender
from vchan.wire.frames import (
    FRAME_BYTES_MIN,
    PLAIN_PAYLOADS,
    ZERO_ID,
    Greeting,
    Key,
    decode_greeting,
    session_keys,
)

HELLO_RETRY_S: Final[tuple[float, ...]] = (0.2, 0.5, 1.0, 2.0, 5.0)
"""Between HELLOs that are not answered: most are lost in a boot or a migration."""
REASON_BYTES_MAX: Final = 800
"""The text of a REFUSE. With two names of 255 bytes in it, it still says what to do."""


class Candidate(NamedTuple):
    """A handshake that we answered and that the peer has not proved yet."""

    mine: Greeting
    peer: Greeting


class Handshake:
    """Greetings, and what was agreed by them.

    Args:
        config: Who we are.
        entropy: Gives that many fresh random bytes; one draw of 16 a handshake.
        sender: Says what was sent.
        receiver: Says what has arrived.
    """

    __slots__ = (
        "_agreed_mine",
        "_agreed_peer",
        "_attached",
        "_config",
        "_entropy",
        "_hellos_sent",
        "_peer_instance",
        "_peer_limits",
        "_receiver",
        "_sender",
        "candidate",
        "hello",
        "refusal",
        "session_id",
        "welcome",
    )

    def __init__(
        self,
        config: Config,
        entropy: Callable[[int], bytes],
        sender: Sender,
        receiver: Receiver,
    ) -> None:
        self._config = config
        self._entropy = entropy
        self._sender = sender
        self._receiver = receiver
        # Of the session: survives streams.
        self.session_id = ZERO_ID
        self._peer_instance = ZERO_ID
        self._peer_limits = (0, 0, 0, 0)
        self._attached = ""
        # Of the greetings on this stream.
        self.hello: Greeting | None = None  # ours; None: no answer is awaited
        self.candidate: Candidate | None = None
        self.welcome: Greeting | None = None  # the next WELCOME's
        self.refusal = b""  # the next REFUSE's
        self._agreed_peer = ZERO_ID  # the peer's nonce of the handshake in force
        self._agreed_mine: Greeting | None = None
        self._hellos_sent = 0

    # ---------------------------------------------------------------- our greetings

    def begin(self) -> None:
        """Say HELLO anew; what was answered before and not proved is void."""
        self.candidate = None
        self._hellos_sent = 0
        self.hello = self._greeting(ZERO_ID)

    def ask_again(self) -> None:
        """Ask in the clear as well: a peer that was rolled back, or took another HELLO for ours,
        cannot open our frames. If it was merely paused, the session goes on."""
        if self.hello is None:
            self.hello = self._greeting(ZERO_ID)

    def retry_s(self) -> float:
        """The HELLO goes out once more: how long to wait for its answer."""
        self._hellos_sent += 1
        return HELLO_RETRY_S[min(self._hellos_sent, len(HELLO_RETRY_S) - 1)]

    def _greeting(self, echo: bytes) -> Greeting:
        config, sender, receiver = self._config, self._sender, self._receiver
        receiver.greet(receiver.grant(sender.backlog))
        return Greeting(
            config.version_min,
            config.version_max,
            config.role,
            config.instance,
            self._entropy(16),
            echo,
            self.session_id,
            receiver.next,
            sender.base,
            sender.tail,
            receiver.credit_greeted,
            config.frame_bytes_max,
            config.message_bytes_max,
            config.reassembly_bytes_max,
            config.name,
            self._attached,
            config.features,
        )

    # ---------------------------------------------------------------- the peer's greetings

    def read(self, payload: bytes) -> Greeting | None:
        """A peer's greeting; None if it is nonsense, or our own that a terminal echoes."""
        peer = decode_greeting(payload)
        return None if peer is None or peer.role == self._config.role else peer

    def is_for_us(self, peer: Greeting) -> bool:
        """Whether a WELCOME answers the HELLO that we sent last."""
        return self.hello is not None and peer.echo == self.hello.nonce

    def refusal_for_us(self, payload: bytes) -> str | None:
        """The reason, if a REFUSE answers the HELLO that we sent last."""
        if self.hello is None or payload[:16] != self.hello.nonce:
            return None
        return printable(payload[16 : 16 + REASON_BYTES_MAX].decode("utf-8", "ignore"))

    def is_new(self, peer: Greeting) -> bool:
        """Whether a HELLO begins a handshake that we have not answered yet."""
        return self.candidate is None or self.candidate.peer.nonce != peer.nonce

    def is_in_force(self, peer: Greeting) -> bool:
        """Whether a HELLO is of the handshake in force: sent again before our answer came."""
        return self._agreed_mine is not None and peer.nonce == self._agreed_peer

    def propose(self, peer: Greeting) -> Key:
        """Take up a HELLO. Returns the key that the peer may prove itself with."""
        if self.hello is None:
            mine = self._greeting(peer.nonce)
        else:
            mine = self.hello._replace(echo=peer.nonce)
        self.candidate = Candidate(mine, peer)
        return self._keys(mine, peer)[1]

    def welcome_candidate(self) -> None:
        """The next WELCOME answers the HELLO that was taken up last."""
        assert self.candidate is not None
        self.welcome = self.candidate.mine

    def welcome_again(self) -> None:
        """The next WELCOME repeats the handshake in force."""
        assert self._agreed_mine is not None
        self.welcome = self._agreed_mine._replace(echo=self._agreed_peer)

    def refuse(self, peer: Greeting, reason: str) -> None:
        """The next REFUSE answers this HELLO."""
        self.refusal = peer.nonce + reason.encode()[:REASON_BYTES_MAX]

    def incompatible(self, peer: Greeting) -> str:
        """Why the two ends cannot talk to each other, or nothing."""
        mine = self._config
        if min(mine.version_max, peer.version_max) < max(mine.version_min, peer.version_min):
            return (
                f"{mine.name or 'vchan'} speaks protocol versions {mine.version_min} to "
                f"{mine.version_max}, {printable(peer.name) or 'the peer'} {peer.version_min} to "
                f"{peer.version_max}: upgrade the older one"
            )
        if (
            peer.frame_bytes_max < FRAME_BYTES_MIN
            or peer.message_bytes_max < MESSAGE_BYTES_MIN
            or peer.reassembly_bytes_max < peer.message_bytes_max
        ):
            return (
                f"limits too small: frames of {FRAME_BYTES_MIN} bytes, messages of "
                f"{MESSAGE_BYTES_MIN} bytes, and one whole message in reassembly, must fit"
            )
        return ""

    # ---------------------------------------------------------------- what is agreed

    def can_resume(self, mine: Greeting, peer: Greeting) -> bool:
        """The same session of the same two instances, and neither has lost what the other needs.

        The peer decides alike, by what the greetings say: a HELLO that waited for its answer does
        not say what we have sent since, so that does not count here either.
        """
        assert self._sender.tail >= mine.send_next or mine.session != self.session_id
        return (
            mine.session == peer.session == self.session_id != ZERO_ID
            and peer.instance == self._peer_instance
            and _limits(peer) == self._peer_limits
            and self._sender.base <= peer.recv_next <= mine.send_next
            and peer.send_base <= mine.recv_next <= peer.send_next
        )

    def agree(self, mine: Greeting, peer: Greeting) -> tuple[Key, Key]:
        """Both ends know both nonces. Returns the keys in force: (to send with, to receive
        with)."""
        self._peer_instance = peer.instance
        self._peer_limits = _limits(peer)
        self._attached = peer.name
        self._agreed_peer, self._agreed_mine = peer.nonce, mine
        self.candidate = None
        self.hello = None
        return self._keys(mine, peer)

    def begin_session(self, mine: Greeting, peer: Greeting) -> None:
        """A new session: the host's nonce names it."""
        assert self._sender.tail == self._receiver.next == 0, "it begins at zero"
        self.session_id = mine.nonce if self._config.role is Role.HOST else peer.nonce

    def forget_session(self) -> None:
        """The session cannot go on, whoever comes."""
        self.session_id = ZERO_ID

    def described(self, peer: Greeting) -> Peer:
        """The peer, as events tell of it."""
        version = min(self._config.version_max, peer.version_max)
        name, attached = printable(peer.name), printable(peer.attached)
        return Peer(peer.instance, name, attached, version, peer.features)

    def _keys(self, mine: Greeting, peer: Greeting) -> tuple[Key, Key]:
        """(key to send with, key to receive with)"""
        is_host = self._config.role is Role.HOST
        nonces = (mine.nonce, peer.nonce) if is_host else (peer.nonce, mine.nonce)
        to_guest, to_host = session_keys(*nonces)
        if mine.features & peer.features & PLAIN_PAYLOADS:
            to_guest, to_host = to_guest._replace(is_plain=True), to_host._replace(is_plain=True)
        return (to_guest, to_host) if is_host else (to_host, to_guest)


def _limits(peer: Greeting) -> tuple[int, int, int, int]:
    sizes = (peer.frame_bytes_max, peer.message_bytes_max, peer.reassembly_bytes_max)
    return (*sizes, peer.features)
