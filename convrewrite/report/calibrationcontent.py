"""What a report says of fitted edits: how near each block comes to its convolution, and the model to the original."""

from __future__ import annotations

from convrewrite.report import figures
from convrewrite.report.document import Section, Table, table
from convrewrite.reports import Calibration, SiteFit

NMSE_NOTE = (
    "NMSE: mean square difference from the original's output at the site, as a share of that output's variance. "
    "Divergence: mean KL divergence of the class probabilities in nats; without classes the outputs' NMSE."
)
PRIOR_NOTE = (
    "No images were given: the NMSE is what a prior on natural images expects. It is no measurement, and often several "
    "times too high; images (--calibrate) measure it and make the fits better."
)
NORMS = {
    "re-estimated": "Batch-norm statistics were measured again: divergence {before} => {after}.",
    "kept": "Batch-norm statistics were kept: measured again, the divergence would be {after} in place of {before}.",
}


def calibration_line(calibration: Calibration) -> str:
    """ "fits up to NMSE 0.03, same top-1 98.4%"."""
    errors = [fit.error for fit in calibration.sites if fit.error is not None]
    worst = f"fits up to NMSE {figures.small(max(errors))}" if errors else "fits not measured"
    if not calibration.images:
        return f"{worst} (expected without images)"
    return worst if calibration.agreement is None else f"{worst}, same top-1 {calibration.agreement:.1%}"


def calibration_section(calibration: Calibration) -> Section:
    """The fits in their order, and what the held-out images say of the whole model."""
    if not calibration.images:
        return Section("Fits", (NMSE_NOTE, PRIOR_NOTE), _fits(calibration))
    whole = f"Divergence {_number(calibration.divergence)}"
    if calibration.agreement is not None:
        whole += f", same top-1 {calibration.agreement:.1%}"
    used = f"{calibration.images} images fitted on, {calibration.held_out} held out to measure on."
    lines = [used, f"Finished model on the held-out images: {whole}."]
    if calibration.norms in NORMS:
        before, after = _number(calibration.norms_before), _number(calibration.norms_after)
        lines.append(NORMS[calibration.norms].format(before=before, after=after))
    if any(fit.covariance == "marginals" for fit in calibration.sites):
        lines.append("Sites marked * have too many numbers in a patch for the memory allowed: fitted on marginals.")
    return Section("Fits", (NMSE_NOTE, *lines), _fits(calibration))


def _fits(calibration: Calibration) -> Table:
    if not calibration.images:
        rows = [(figures.plain(f.edit), figures.plain(f.block), _number(f.nmse_free)) for f in calibration.sites]
        return table(("site", "block", "NMSE expected"), rows, "llr")
    headers = (
        "site",
        "block",
        "without images",
        "on images",
        "NMSE held out",
        "divergence so far",
        "same top-1 so far",
    )
    return table(headers, [_row(fit) for fit in calibration.sites], "llrrrrr")


def _row(fit: SiteFit) -> tuple[str, ...]:
    star = "*" if fit.covariance == "marginals" else ""
    return (
        figures.plain(fit.edit) + star,
        figures.plain(fit.block),
        _number(fit.nmse_free),
        _number(fit.nmse_fit),
        _number(fit.nmse),
        _number(fit.divergence),
        "-" if fit.agreement is None else f"{fit.agreement:.1%}",
    )


def _number(value: float | None) -> str:
    return "-" if value is None else figures.small(value)
