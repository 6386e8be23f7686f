"""The identity of a run is a promise: every version ever shipped is pinned here."""

import hashlib

from dav_bench.spec import IDENTITY_VERSION, RunSpec

SPEC = RunSpec(
    task="dna",
    task_version=1,
    task_hash="0123456789abcdef",
    method="dav",
    params={"width": 4, "alpha": 0.005, "guide": True, "stop_reward": None, "betas": (0.9, 0.999), "target": "x"},
    model={"use": "mdlm-dna", "weights": ""},
    sampler={"steps": 64},
    rewards={"train": {"use": "hepg2-specificity"}, "heldout": {"use": "hepg2-specificity-heldout"}},
    eval={"samples": 256, "seed": 20000, "every": 4},
    budget={"unit": "cost"},
    search={"name": "tree", "params": {"width": 4}},
    heldout=True,
    seed=2,
)

CANONICAL = (
    '{"budget":{"unit":"cost"},"eval":{"every":4,"samples":256,"seed":20000},"heldout":true,"identity":1,'
    '"method":"dav","model":{"use":"mdlm-dna","weights":""},"params":{"alpha":0.005,"betas":[0.9,0.999],'
    '"guide":true,"stop_reward":"none","target":"x","width":4},"rewards":{"heldout":'
    '{"use":"hepg2-specificity-heldout"},"train":{"use":"hepg2-specificity"}},"sampler":{"steps":64},'
    '"search":{"name":"tree","params":{"width":4}},"seed":2,"task":"dna","task_hash":"0123456789abcdef",'
    '"task_version":1}'
)


def test_identity_version_1():
    assert IDENTITY_VERSION == 1
    assert SPEC.identity == hashlib.sha256(CANONICAL.encode()).hexdigest()
    assert SPEC.run_id == hashlib.sha256(CANONICAL.replace('"seed":2,', "").encode()).hexdigest()[:8]


def test_a_run_without_search_leaves_the_key_out():
    text = CANONICAL.replace('"search":{"name":"tree","params":{"width":4}},', "")
    assert SPEC.base().identity == hashlib.sha256(text.encode()).hexdigest()
