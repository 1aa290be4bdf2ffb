"""Expectations of a report: the kernel or the rewrite that a site has to get.

A rewrite can stop to fire without an error: a model changes a layout, a library changes a contract.
`assert_fired` turns that into a failure of the user's tests.
"""

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase

from fixpass.passes.base import Remark
from fixpass.passes.remarks import Report
from fixpass.runtime.errors import ExpectationError


def assert_fired(report: Report, expect: Mapping[str, str]) -> None:
    """Fail where a site did not get the kernel, or the rewrite, that is expected.

    Args:
        report: the report of `fixpass.explain`, or one of `fixpass.last_reports()`.
        expect: for each site the name of its kernel, or of a pass with an `applied` remark there.
            A site is the end of a module's path, such as "q_norm" or "layers.0.self_attn.q_norm";
            `*` stands for any text. Every module that matches must fulfil the expectation.

    Raises:
        ExpectationError: a site got something else, or no module has that path. The error lists
            what each site got, its line and the remarks that say why.

    Example:
        >>> assert_fired(fixpass.explain(model, tokens), {"q_norm": "strided_qk_norm"})
    """
    faults = [fault for site, name in expect.items() for fault in _faults(report, site, name)]
    if faults:
        raise ExpectationError("\n".join([f"{report.title or 'report'}:", *faults]))


def _faults(report: Report, wanted: str, name: str) -> Iterator[str]:
    sites = [site for site in _sites(report) if _matches(site, wanted)]
    if not sites:
        known = ", ".join(_sites(report)) or "none"
        yield f"  {wanted}: no remark is about such a module; modules with remarks: {known}"
    for site in sites:
        remarks = [remark for remark in report.remarks if site in sites_of(remark)]
        if not _fired(remarks, name):
            yield from _explain(site, name, remarks)


def _fired(remarks: list[Remark], name: str) -> bool:
    """Whether the last choice for a site is the kernel `name`, or the pass `name` changed it."""
    if any(remark.pass_name == name and remark.kind == "applied" for remark in remarks):
        return True
    return _kernel(remarks) == name


def _kernel(remarks: list[Remark]) -> str:
    """The kernel that the last pass chose; later passes join what earlier ones have chosen."""
    return next((remark.choice.kernel for remark in reversed(remarks) if remark.choice), "")


def _explain(site: str, name: str, remarks: list[Remark]) -> Iterator[str]:
    place = next((f" at {remark.line}" for remark in remarks if remark.line), "")
    yield f"  {site}{place}: {name} is expected; it got {_kernel(remarks) or 'no kernel'}"
    missed = [remark for remark in remarks if remark.kind != "applied"]
    about = [remark for remark in missed if name in remark.text] or missed or remarks
    yield from (f"    {remark.pass_name}: {remark.kind}: {remark.text}" for remark in about)


def _sites(report: Report) -> list[str]:
    names = (name for remark in report.remarks for name in sites_of(remark))
    return list(dict.fromkeys(names))


def sites_of(remark: Remark) -> tuple[str, ...]:
    """The modules that a remark is about; its node where the model has no modules."""
    joined = remark.choice.sites if remark.choice else ()
    return joined or (remark.where or remark.node,)


def is_at(remark: Remark, wanted: str) -> bool:
    """Whether the remark is about a module that the site of an expectation names."""
    return any(_matches(site, wanted) for site in sites_of(remark))


def _matches(site: str, wanted: str) -> bool:
    return fnmatchcase(site, wanted) or fnmatchcase(site, f"*.{wanted}")
