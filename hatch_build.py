"""Compile the CPU kernels when the package is installed or a wheel is built; without a compiler, go on without them."""

from __future__ import annotations

import importlib.util
import os
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class KernelBuildHook(BuildHookInterface):
    """`FOURBIT_BUILD_KERNELS=0` skips the compilation, `=1` makes its failure an error."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Build src/fourbit/kernels/cpu/_kernels.so, and tag the wheel with the platform."""
        wanted = os.environ.get("FOURBIT_BUILD_KERNELS", "")
        if self.target_name != "wheel" or wanted == "0":
            return
        path = Path(self.root, "src", "fourbit", "kernels", "cpu", "_build.py")
        spec = importlib.util.spec_from_file_location("fourbit_build", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        try:
            built = module.build()
        except (module.BuildError, OSError) as error:
            if wanted == "1":
                raise
            self.app.display_warning(f"fourbit is installed without its CPU kernels: {error}")
            return
        build_data["artifacts"].append(str(built.relative_to(self.root)))
        if version == "editable":
            return
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
