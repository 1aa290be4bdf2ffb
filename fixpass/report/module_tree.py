"""The sites of a report as the tree of the model's modules, and grouped by their outcome."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from fixpass.passes.base import Remark
from fixpass.passes.remarks import Report, without_names
from fixpass.passes.source_lines import SourceLine
from fixpass.report.expected import sites_of
from fixpass.report.sites import SiteFacts

Norms = tuple[tuple[SiteFacts, str], ...]
"""Norms, each with the kernel that `select-norm-kernel` chose."""


@dataclass(frozen=True)
class SiteView:
    """A module with its remarks and its norms."""

    where: str
    remarks: tuple[Remark, ...]
    norms: Norms

    @property
    def kernel(self) -> str:
        """The kernel that the last pass chose, such as one for two norms; empty where none did."""
        return next((r.choice.kernel for r in reversed(self.remarks) if r.choice), "")

    @property
    def copied(self) -> tuple[str, ...]:
        """The operands that are copied for the kernel."""
        return next((r.choice.copied for r in self.remarks if r.choice and r.choice.copied), ())

    @property
    def is_missed(self) -> bool:
        return any(remark.kind != "applied" for remark in self.remarks)


@dataclass(frozen=True)
class SiteBody:
    """What the page shows of an opened site; sites of equal layers have the same."""

    kernel: str
    copied: tuple[str, ...]
    line: SourceLine | None
    remarks: tuple[tuple[str, str, str], ...]
    """Pass, kind and text of each remark, without the numbers of nodes."""
    norms: Norms

    @staticmethod
    def of(view: SiteView) -> "SiteBody":
        remarks = tuple((r.pass_name, r.kind, without_names(r.text)) for r in view.remarks)
        norms = tuple((replace(norm, node="", where=""), kernel) for norm, kernel in view.norms)
        return SiteBody(view.kernel, view.copied, view.remarks[0].line, remarks, norms)

    @property
    def op(self) -> str:
        """The op of its norm; the passes that changed a module without a norm."""
        return self.norms[-1][0].op if self.norms else ", ".join({r[0]: None for r in self.remarks})

    @property
    def layout(self) -> str:
        return self.norms[-1][0].layout if self.norms else ""

    @property
    def missed(self) -> tuple[str, ...]:
        """Why rewrites were missed."""
        texts = (text for _, kind, text in self.remarks if kind != "applied")
        return tuple(dict.fromkeys(texts))

    @property
    def cost(self) -> str:
        """Bytes and launches of the kernel that `select-norm-kernel` chose."""
        found = ((row, kernel) for norm, kernel in self.norms[-1:] for row in norm.kernels)
        return next((row.cost for row, kernel in found if row.name == kernel), "")


@dataclass(frozen=True)
class Leaf:
    """A site in the tree."""

    name: str
    view: SiteView
    body: int
    """The number of its body."""


@dataclass(frozen=True)
class Branch:
    """A module that holds sites, or modules with sites."""

    name: str
    sites: tuple[Leaf, ...]
    branches: tuple["Branch", ...]

    @property
    def leaves(self) -> Iterator[Leaf]:
        yield from self.sites
        for branch in self.branches:
            yield from branch.leaves

    @property
    def num_sites(self) -> int:
        return sum(1 for _ in self.leaves)

    @property
    def num_missed(self) -> int:
        return sum(leaf.view.is_missed for leaf in self.leaves)


@dataclass(frozen=True)
class Outcome:
    """Sites with the same op, layout, kernel and line."""

    body: SiteBody
    """That of its first site."""
    leaves: tuple[Leaf, ...]


def views_of(report: Report, sites: Iterable[SiteFacts]) -> Iterator[SiteView]:
    """The sites in the order of the remarks."""
    facts = {(site.node, site.where): site for site in sites}
    groups: dict[str, list[Remark]] = {}
    for remark in report.remarks:
        for where in sites_of(remark):
            groups.setdefault(where, []).append(remark)
    for where, remarks in groups.items():
        chosen = ((facts.get((r.node, r.where)), r.choice) for r in remarks if r.choice)
        norms = tuple((site, choice.kernel) for site, choice in chosen if site)
        yield SiteView(where, tuple(remarks), norms)


def leaves_of(views: Iterable[SiteView], numbers: Mapping[SiteBody, int]) -> Iterator[Leaf]:
    """Each site with the number of its body."""
    for view in views:
        yield Leaf(view.where.rpartition(".")[2], view, numbers[SiteBody.of(view)])


def module_tree(leaves: Iterable[Leaf]) -> Branch:
    """The modules that hold the leaves. A module that holds only one module is one name with it."""
    return _branch("", [(leaf.view.where.split("."), leaf) for leaf in leaves])


def _branch(name: str, entries: list[tuple[list[str], Leaf]]) -> Branch:
    sites = tuple(leaf for parts, leaf in entries if len(parts) == 1)
    inner: dict[str, list[tuple[list[str], Leaf]]] = {}
    for parts, leaf in entries:
        if len(parts) > 1:
            inner.setdefault(parts[0], []).append((parts[1:], leaf))
    if name and not sites and len(inner) == 1:
        ((key, only),) = inner.items()
        return _branch(f"{name}.{key}", only)
    return Branch(name, sites, tuple(_branch(key, found) for key, found in inner.items()))


def outcomes_of(leaves: Iterable[Leaf], bodies: Sequence[SiteBody]) -> list[Outcome]:
    """The outcomes: those with a missed rewrite first, then the rarest."""
    groups: dict[tuple[object, ...], list[Leaf]] = {}
    for leaf in leaves:
        body = bodies[leaf.body]
        groups.setdefault((body.op, body.layout, body.kernel, body.missed, body.line), []).append(
            leaf
        )
    found = [Outcome(bodies[group[0].body], tuple(group)) for group in groups.values()]
    return sorted(found, key=_rank)


def _rank(outcome: Outcome) -> tuple[bool, bool, int]:
    """Norms before other sites, so that a missed norm stands at the top."""
    return not outcome.body.missed, not outcome.body.norms, len(outcome.leaves)
