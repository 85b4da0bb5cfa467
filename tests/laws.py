"""What the tests of laws share: how many examples they try, and random damage to files of JSON.

`DDAE_LAWS=50` tries fifty times as many examples, other ones each time; without it, every run tries the same ones.
"""

import contextlib
import json
import os
import signal
from dataclasses import dataclass
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

TIMES = int(os.environ.get("DDAE_LAWS", "1"))
SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]


def law(examples):
    """The settings of a test that states a law and tries so many examples of it."""
    return settings(
        max_examples=examples * TIMES,
        deadline=None,
        derandomize=TIMES == 1,
        database=None,
        print_blob=True,
        suppress_health_check=SLOW,
    )


class Hung(BaseException):
    """Something has computed for too long; it derives from no error that a library would catch."""


@contextlib.contextmanager
def within(seconds):
    """Stop what takes more seconds of this process than these, so that a busy machine stops nothing else."""

    def stop(*args):
        raise Hung

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def places(content, above=()):
    """Yield the place of everything inside of parsed JSON, as its keys and indices."""
    inner = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in inner:
        yield (*above, key)
        yield from places(value, (*above, key))


@dataclass(frozen=True)
class _Edit:
    """A change of one place, given by its keys, or by a number, which counts all places of a file."""

    place: Any

    def __call__(self, text):
        content = json.loads(text)
        every = list(places(content))
        if not every:
            return text.encode()
        place = every[self.place % len(every)] if isinstance(self.place, int) else self.place
        parent = content
        for key in place[:-1]:
            parent = parent[key]
        self.change(parent, place[-1])
        return json.dumps(content).encode()


@dataclass(frozen=True)
class Removed(_Edit):
    def change(self, parent, key):
        del parent[key]


@dataclass(frozen=True)
class Renamed(_Edit):
    name: str

    def change(self, parent, key):
        value = parent.pop(key)
        if isinstance(parent, dict):
            parent[self.name] = value


@dataclass(frozen=True)
class Replaced(_Edit):
    value: Any

    def change(self, parent, key):
        parent[key] = self.value


@dataclass(frozen=True)
class Added(_Edit):
    """Another key beside a place."""

    name: str
    value: Any

    def change(self, parent, key):
        if isinstance(parent, dict):
            parent[self.name] = self.value


@dataclass(frozen=True)
class Truncated:
    share: float

    def __call__(self, text):
        return text.encode()[: int(self.share * len(text.encode()))]


@dataclass(frozen=True)
class Flipped:
    share: float
    byte: int

    def __call__(self, text):
        content = bytearray(text.encode())
        content[int(self.share * (len(content) - 1))] = self.byte
        return bytes(content)


@dataclass(frozen=True)
class Whole:
    """Something else in place of the file."""

    content: bytes

    def __call__(self, text):
        return self.content


DEEP = b'{"a":' * 50_000 + b"1" + b"}" * 50_000
NAMES = """auto_map custom_pipeline _class_name self cls dtype torch_dtype num_labels id2label label2id trained_betas
    sample_size null_class architectures attn_implementation vae unet scheduler problem_type quantization_config
    model_type weights metadata weight_map x""".split()
WORDS = (
    """x ../../x ../evil.safetensors /etc/passwd evil evil.Evil pipeline os diffusers DDPMScheduler UNet2DModel
    AutoencoderKL load eager kernels/evil""".split()
    + ["", "a\0b", "\ud800"]
)
NUMBERS = [0, 1, -1, 2, 7, 0.5, -0.5, 1e308, float("nan"), float("inf")]
NUMBERS += [10**6, 10**9, 10**18, 10**30, -(10**30), 10**400]
_atoms = st.none() | st.booleans() | st.sampled_from(NUMBERS) | st.sampled_from(WORDS)
values = st.recursive(
    _atoms,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=2),
    max_leaves=4,
)
_numbers = st.integers(0, 10_000)
_shares = st.floats(0, 1)
edits = st.one_of(
    st.builds(Replaced, _numbers, values),
    st.builds(Replaced, _numbers, _atoms),
    st.builds(Added, _numbers, st.sampled_from(NAMES), values),
    st.builds(Removed, _numbers),
    st.builds(Renamed, _numbers, st.sampled_from(NAMES)),
)
of_bytes = st.one_of(
    st.builds(Truncated, _shares),
    st.builds(Flipped, _shares, st.integers(0, 255)),
    st.sampled_from([Whole(b""), Whole(b"[" * 100_000), Whole(DEEP), Whole(b"\xff\xfe{\x00}\x00"), Whole(b"[]")]),
)
damages = st.one_of(edits, edits, edits, of_bytes)


@contextlib.contextmanager
def damaged(file, damage):
    """Damage a file, and bring it back at the end."""
    before = file.read_bytes()
    file.write_bytes(damage(before.decode()))
    try:
        yield
    finally:
        file.write_bytes(before)


def says_why(error):
    """Whether an error is one of ours: of the two kinds that we raise, with a sentence."""
    return type(error) in (ValueError, OSError) and len(str(error).split()) > 3


def works_or_says_why(function, *args):
    """Call a function: it returns within seconds, or it raises one of our errors."""
    with within(20):
        try:
            function(*args)
        except (ValueError, OSError) as error:
            if not says_why(error):
                raise AssertionError(f"{type(error).__name__}: {error}") from error
