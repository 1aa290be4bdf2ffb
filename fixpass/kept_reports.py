"""Reports beside Inductor's cached graphs: a graph from the cache runs no pass, and has a report.

A report is a JSON file in Inductor's cache folder. Its key holds the graph that Dynamo traced, its
inputs and the key of our passes, as the keys of Inductor's caches do.
"""

import hashlib
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._inductor import config as inductor_config
from torch._inductor.runtime.cache_dir_utils import cache_dir

from fixpass.passes.remarks import Report, reports_from_json, reports_to_json

log = logging.getLogger("fixpass")


@dataclass
class KeptReports:
    """The reports of the graphs of one compile: made now, or read where no pass ran."""

    path: Path | None
    """The file; None where nothing is cached."""
    made: list[Report] = field(default_factory=list)

    @staticmethod
    def of(gm: fx.GraphModule, uuid: Any, options: Mapping[str, Any]) -> "KeptReports":
        """The reports of a graph that Dynamo traced.

        Args:
            gm: the graph as the compiler gets it.
            uuid: the key of our passes; None where they have none.
            options: the options of Inductor.
        """
        if uuid is None or inductor_config.force_disable_caches:
            return KeptReports(None)
        digest = hashlib.sha256(repr((uuid, *_facts(gm, options))).encode())
        return KeptReports(Path(cache_dir()) / "fixpass" / f"{digest.hexdigest()}.json")

    def add(self, report: Report) -> None:
        """Keep a report that a pass has just made; the backward graph's may come much later."""
        self.made.append(report)
        if self.path is None:
            return
        part = self.path.with_suffix(f".{os.getpid()}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(reports_to_json(self.made))
            part.replace(self.path)
        # The graph is compiled: a full disk costs the report of a later start, not this one.
        except OSError as error:
            log.info("the report is not kept: %s", error)

    def recall(self) -> Sequence[Report]:
        """The kept reports, where the graph came from a cache and no pass ran."""
        if self.made or self.path is None:
            return ()
        try:
            return reports_from_json(self.path.read_text())
        # Another version wrote it, or the folder was cleaned: the cached graph is right anyway.
        except (OSError, ValueError, TypeError, KeyError) as error:
            log.info("the graph is from Inductor's cache, without its report: %s", error)
            return ()


def _facts(gm: fx.GraphModule, options: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a report depends on besides the passes."""
    modules = [module for module in gm.modules() if isinstance(module, fx.GraphModule)]
    inputs = [_describe(n.meta.get("example_value")) for n in gm.graph.find_nodes(op="placeholder")]
    state = (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
    plain = sorted((k, v) for k, v in options.items() if isinstance(v, (bool, int, float, str)))
    return [module.code for module in modules], inputs, state, plain


def _describe(value: Any) -> Any:
    if isinstance(value, (int, float, str, torch.SymInt, torch.SymFloat, torch.SymBool)):
        return str(value)
    if not isinstance(value, torch.Tensor):
        # Other objects may print their address, which is another one in each process.
        return type(value).__qualname__
    stride = str(value.stride()) if value.layout == torch.strided else ""
    return str(value.shape), stride, value.dtype, value.device, value.requires_grad
