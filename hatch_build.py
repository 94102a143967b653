"""What the build reads from files: the pins of requirements.txt and requirements-dev.txt are those of the package."""

from pathlib import Path

from hatchling.metadata.plugin.interface import MetadataHookInterface


class Pins(MetadataHookInterface):
    def update(self, metadata: dict) -> None:
        def pins(name: str) -> list[str]:
            lines = Path(self.root, name).read_text("utf-8").splitlines()
            return [line.split(" #")[0] for line in lines if line[:1].isalpha()]

        dev = pins("requirements-dev.txt")
        tracking = [pin for pin in dev if pin.startswith(("tensorboard", "wandb"))]
        metadata |= {"dependencies": pins("requirements.txt")}
        metadata |= {"optional-dependencies": {"dev": dev, "tracking": tracking}}
