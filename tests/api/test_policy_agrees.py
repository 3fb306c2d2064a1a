"""Python and CEL say the same of random pods under random policies."""

import re
from typing import Any

import pytest
from api.test_policy import said_by_cel, said_by_python
from hypothesis import given, settings
from hypothesis import strategies as st
from internvl_api.validation.policy import Policy
from internvl_api.validation.policy_rules import RULES

WORDS = st.sampled_from(
    ["a", "ab", "name", "a/", "a/b", "a/b/c", "a:1", "a@sha256:0", "system-x", "hostPath", "nfs", "secret", "(all)",
     "node-role.kubernetes.io/x", "it's", 'say "so"', "{0}", "%s", "kueue.x-k8s.io/queue-name",
     "kueue.x-k8s.io/priority-class", "\\", "ü", ""]
)  # fmt: skip
ENTRIES = st.lists(WORDS.filter(lambda word: word and " " not in word) | st.just("*"), max_size=3)


def some(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=fields)


def many(items: st.SearchStrategy[Any]) -> st.SearchStrategy[list[Any]]:
    return st.lists(items, max_size=3)


named = some(name=WORDS)
cloned = some(dataSource=named, dataSourceRef=named)
volumes = some(
    name=WORDS, emptyDir=some(), hostPath=some(path=WORDS), secret=some(secretName=WORDS), image=some(reference=WORDS),
    csi=some(nodePublishSecretRef=named), persistentVolumeClaim=some(claimName=WORDS),
    ephemeral=some(volumeClaimTemplate=some(spec=cloned)), nfs=some(), cephfs=some(secretRef=named),
    projected=some(sources=many(some(secret=named, configMap=named, serviceAccountToken=some(audience=WORDS)))),
)  # fmt: skip
nodes = some(matchExpressions=many(some(key=WORDS, operator=st.sampled_from(["In", "DoesNotExist", "Exists"]))))
term = some(namespaces=many(WORDS), namespaceSelector=some(matchLabels=some()))
REQUIRED, PREFERRED = (f"{word}DuringSchedulingIgnoredDuringExecution" for word in ("required", "preferred"))
beside = some(**{REQUIRED: many(term), PREFERRED: many(some(podAffinityTerm=term))})
affinity = some(
    nodeAffinity=some(**{REQUIRED: some(nodeSelectorTerms=many(nodes)), PREFERRED: many(some(preference=nodes))}),
    podAffinity=beside,
    podAntiAffinity=beside,
)
keys = st.dictionaries(WORDS, WORDS, max_size=3)
addresses = WORDS | WORDS.map(lambda word: f"pvc://{word}")
datasets = st.dictionaries(WORDS, some(annotation=addresses, questions=addresses, root=addresses), max_size=3)
parts = some(
    model=some(source=addresses),
    data=some(meta=addresses, metaRoot=addresses, validationMeta=addresses, train=datasets, validation=datasets),
    evaluation=some(tasks=st.dictionaries(WORDS, some(annotation=addresses, root=addresses), max_size=3)),
    scheduling=some(queue=WORDS, schedulerName=WORDS),
    secrets=some(objectStorage=WORDS, huggingFace=WORDS),
    network=some(profile=WORDS),
    podTemplate=some(
        image=WORDS, serviceAccountName=WORDS, priorityClassName=WORDS, runtimeClassName=WORDS, labels=keys,
        annotations=keys, nodeSelector=keys, affinity=affinity, volumes=many(volumes),
        tolerations=many(some(key=WORDS, operator=st.just("Exists"))), imagePullSecrets=many(named),
        env=many(some(name=WORDS, valueFrom=some(secretKeyRef=named))),
    ),
)  # fmt: skip
policies = st.fixed_dictionaries({rule.setting: ENTRIES for rule in RULES})


def unordered(messages: list[str]) -> list[tuple[str, list[str]]]:
    """Messages with the values found in one order: a map has none in CEL."""
    parts = [re.fullmatch("(.*: found )(.*)(, which the policy.*)", message) for message in messages]
    return [(part[1] + part[3], sorted(part[2].split(", "))) for part in parts if part]


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(parts, policies)
def test_python_and_cel_agree(spec: dict[str, Any], policy: dict[str, list[str]]) -> None:
    chosen = Policy.model_validate(policy)
    assert unordered(said_by_python(spec, chosen)) == unordered(said_by_cel(spec, chosen))
