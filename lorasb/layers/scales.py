"""PEFT's switches of an adapter's scale: s is multiplied for a while, as diffusers and users of several adapters do."""

from __future__ import annotations

from peft.tuners.tuners_utils import BaseTunerLayer


class Scales(BaseTunerLayer):
    """A tuner layer with a scaling s by adapter name, and the one that each adapter was made with."""

    scaling: dict[str, float]
    first_scaling: dict[str, float]

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set an adapter's s to `scale` times the one that it was made with; others' names are passed over."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale * self.first_scaling[adapter]

    def set_scale_as_made(self, adapter: str, scaling: float) -> None:
        """Set an adapter's s, as if it had been made with it."""
        self.scaling[adapter] = self.first_scaling[adapter] = scaling

    def scale_layer(self, scale: float) -> None:
        """Multiply the s of every active adapter."""
        for name in self._active_here():
            self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the s of every active adapter; None puts back the one that it was made with."""
        for name in self._active_here():
            self.scaling[name] = self.first_scaling[name] if scale is None else self.scaling[name] / scale

    def _active_here(self) -> list[str]:
        return [name for name in self.active_adapters if name in self.scaling]
