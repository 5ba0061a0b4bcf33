from __future__ import annotations

import pytest

from lightning_gemini.cli.choices import known_choices, load_choice
from lightning_gemini.controlplane.faults.models import make_model
from lightning_gemini.core.failure_model import PoissonModel, SequenceModel, SoakModel
from lightning_gemini.errors import ConfigurationError


def test_a_name_alone_is_the_file() -> None:
    name, settings = load_choice("failure", "software")
    assert (name, settings["kinds"], settings["repeat"]) == ("software", ["software"], 1)


def test_overrides_are_yaml_and_commas_in_brackets_and_quotes_are_theirs() -> None:
    _, settings = load_choice("failure", "every_tier, kinds=[root,etcd], stretch=7,wait_for_persistent=false")
    assert (settings["kinds"], settings["stretch"]) == (["root", "etcd"], 7)
    assert settings["wait_for_persistent"] is False
    _, settings = load_choice("operator", "command,command='ssh {name}, {agent}',pool=3")
    assert (settings["command"], settings["pool"]) == ("ssh {name}, {agent}", 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "failure must be one of correlated, every_tier"),
        ("earthquake", "got 'earthquake'"),
        ("../operator/local", "failure must be one of"),
        ("software,strech=3", "has no setting 'strech'; it has: model, kinds, stretch"),
        ("software,stretch", "expected key=value after the name, found 'stretch'"),
        ("software,=3", "expected key=value"),
        ("software,stretch=long", "stretch must be a number, got 'long'"),
        ("software,stretch=true", "stretch must be a number"),
        ("software,kinds=root", "kinds must be a list"),
        ("software,kinds=[", "a value is no YAML"),
        ("software,stretch=${nothing}", "nothing"),
    ],
)
def test_what_cannot_be_is_refused_with_what_can(text: str, message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load_choice("failure", text)
    assert message in str(caught.value)


def test_every_failure_model_that_ships_can_be_made() -> None:
    names = known_choices("failure")
    assert {"none", "software", "hardware", "correlated", "poisson", "trace", "every_tier", "soak"} <= set(names)
    for name in set(names) - {"trace", "poisson"}:
        make_model(load_choice("failure", name)[1])
    assert make_model(load_choice("failure", "none")[1]) == SequenceModel(())
    poisson = make_model(load_choice("failure", "poisson,software=2000,hardware=1.5")[1])
    assert isinstance(poisson, PoissonModel)
    assert {kind: poisson.rates[kind] for kind in poisson.kinds} == {"software": 2000, "hardware": 1.5}
    soak = make_model(load_choice("failure", "soak,overlap=0,group=0")[1])
    assert isinstance(soak, SoakModel)
    assert soak.overlap == 0
    assert "group" not in soak.kinds


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("software,kinds=[flood]", "kinds must be of software, hardware"),
        ("software,stretch=0", "stretch must be 1 or more"),
        ("poisson", "needs a rate above 0"),
        ("poisson,software=-1", "software must be 0 or more"),
        ("trace", "trace needs a file"),
        ("trace,file=/no/such", "cannot read the trace /no/such"),
        ("soak,calm_s=[3,1]", "calm_s must be two growing numbers"),
        ("soak,calm_s=[3]", "the failure model soak cannot take"),
    ],
)
def test_impossible_models_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        make_model(load_choice("failure", text)[1])
    assert message in str(caught.value)
