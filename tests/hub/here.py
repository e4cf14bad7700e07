"""A user's folder, in which a worker downloads and publishes models."""

from __future__ import annotations

from pathlib import Path

from tests.checkpoint.published import V1_SHAPES, checkpoint_bytes
from tests.hub.worker import Worker

REPO = "nnandal/niels-gpt"
V1_FILE = checkpoint_bytes("v1", V1_SHAPES[3])
CARD = "README.md"


class Here:
    """A user's folder, in which the programs run."""

    def __init__(self, worker: Worker, folder: Path) -> None:
        self._worker, self.folder = worker, folder
        self.best = folder / "checkpoints/best.pt"
        self.said = ""

    def download(self, *argv: str) -> int:
        return self._run("niels_gpt.hub.download", argv, None)

    def upload(self, *argv: str, token: str | None = "hf_right") -> int:
        return self._run("niels_gpt.hub.upload", argv, token)

    def _run(self, module: str, argv: tuple[str, ...], token: str | None) -> int:
        status: int = self._worker.ask(do="program", module=module, argv=list(argv), cwd=str(self.folder), token=token)
        self.said = self._worker.said
        return status

    def error(self) -> str:
        """The one line of error that the program ended with."""
        errors = [line for line in self.said.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and self.said.endswith(errors[0] + "\n"), self.said
        assert "Traceback" not in self.said and len(errors[0]) < 450
        return errors[0]

    def names(self) -> list[str]:
        return sorted(path.name for path in self.folder.rglob("*") if path.is_file())
