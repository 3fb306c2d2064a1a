"""Generate the part of the chart's ValidatingAdmissionPolicy that comes from the policy's rules.

The chart adds the names, and one variable for each setting with its list. A changed section that the rules read must
obey; a resource that is older than the policy can still be suspended, labelled and deleted.
Reference: Kubernetes documentation, "Validating Admission Policy".
"""

from typing import Any

from internvl_api.crd import as_yaml
from internvl_api.generated import generate
from internvl_api.validation.policy_rules import RULES, SECTIONS, PolicyRule


def build_admission_policy() -> dict[str, Any]:
    """The parts of the ValidatingAdmissionPolicy's `spec`, and the `settings` that become variables before them."""
    return {
        "settings": [rule.setting for rule in RULES],
        "matchConditions": [{"name": "sections-change", "expression": _sections_change()}],
        "variables": [{"name": _found(rule), "expression": rule.found_cel()} for rule in RULES],
        "validations": [_validation(rule) for rule in RULES],
    }


def _sections_change() -> str:
    """CEL that is true unless an update leaves the sections that the rules read as they were."""
    same = (
        f"has(object.spec.{part}) == has(oldObject.spec.{part}) && "
        f"(!has(object.spec.{part}) || object.spec.{part} == oldObject.spec.{part})"
        for part in SECTIONS
    )
    return f"oldObject == null || !({' && '.join(same)})"


def _found(rule: PolicyRule) -> str:
    return f"refused{rule.setting[0].upper()}{rule.setting[1:]}"


def _validation(rule: PolicyRule) -> dict[str, str]:
    found = f"variables.{_found(rule)}"
    return {
        "expression": f"size({found}) == 0",
        "message": f"{rule.field}: found what policy.{rule.setting} of the operator's chart does not allow",
        "messageExpression": rule.message_cel(found),
        "reason": "Forbidden",
    }


def main() -> int:
    """Write the chart's part to each path; with `--check` fail when a file is out of date."""
    return generate(main.__doc__, lambda path: {path: as_yaml(build_admission_policy())})


if __name__ == "__main__":
    raise SystemExit(main())
