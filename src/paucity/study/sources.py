"""What a study was measured on, so that an unfinished one is only continued on the same."""

import hashlib
from pathlib import Path

from pydantic import BaseModel

from ..measure.data import read_text
from .plan import Study


class Sourced(BaseModel):
    """A plan, and digests of what it names by path alone.

    Attributes:
        plan: the study.
        digests: of the texts, of YAML files of lm-eval, and, where the model is a folder, of its configuration and the
            names and sizes of its files.
    """

    plan: Study
    digests: dict[str, str]

    @classmethod
    def of(cls, plan: Study) -> "Sourced":
        """Read what ``plan`` names.

        Raises:
            InputError: if a text cannot be read.
        """
        found = {
            "text": read_text(plan.text, role="study").encode(),
            "calibration_text": read_text(plan.calibration_text, role="calibration").encode(),
        }
        found |= {task: Path(task).read_bytes() for task in plan.lm_eval if Path(task).is_file()}
        folder = Path(plan.model).expanduser()
        if plan.model != "embedded" and (folder / "config.json").is_file():
            files = sorted((file.name, file.stat().st_size) for file in folder.iterdir() if file.is_file())
            found["model"] = (folder / "config.json").read_bytes() + repr(files).encode()
        return cls(plan=plan, digests={name: hashlib.sha256(data).hexdigest() for name, data in found.items()})
