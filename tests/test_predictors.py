"""The predictors with known answers are what they say, by counting."""

import numpy as np
import pytest
import torch
from predictors import ClassOnly, Marginal, Memoriser, Perfect, Uniform, known_context, make_world

from nano4m_cli.generate.likelihood import slot_nll
from nano4m_cli.generate.sampler import GenerateOptions


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("known"))


def nll(context, sources, target):
    shown = context.inside_NC & context.columns(*sources)
    asked = context.inside_NC & context.columns(target)
    return slot_nll(context.model, context.ids_NC, shown, asked, context.inside_NC)[:, context.layout.slice(target)]


def test_the_world_is_what_the_tokens_say(world):
    context = known_context(Perfect(world))
    assert context.n == 64 and (context.ids_NC == world.ids_KC).all() and (context.inside_NC == world.inside_KC).all()
    assert context.tokenizer("caption").decode(context.ids("caption"))[10] == "a green thing, number 2"
    for label, text in zip(context.labels, context.raw_captions(), strict=True):
        for field in label["fields"]:
            assert text[slice(*field["span"])] == label["objects"][0][field["attribute"]]


def test_uniform_is_log_v_and_perfect_is_nothing(world):
    for target, size in zip(("rgb", "audio"), (12, 10), strict=True):
        assert np.allclose(nll(known_context(Uniform(world)), ["caption"], target), np.log(size), atol=1e-6)
        assert np.nanmax(np.abs(nll(known_context(Perfect(world)), ["caption"], target))) < 1e-6
    assert np.nanmax(np.abs(nll(known_context(Perfect(world)), ["rgb"], "caption"))) < 1e-6


def test_from_nothing_text_costs_the_entropy_of_the_kinds(world):
    """The chain rule: 64 kinds equally likely, each with a caption of its own."""
    assert np.allclose(np.nansum(nll(known_context(Perfect(world)), [], "caption"), 1), np.log(64), atol=1e-5)


def test_class_only_costs_the_entropy_within_the_class(world):
    assert np.allclose(np.nansum(nll(known_context(ClassOnly(world)), ["rgb"], "caption"), 1), np.log(8), atol=1e-5)
    grid = nll(known_context(ClassOnly(world)), ["audio"], "rgb")
    for k in range(64):  # per slot: how often the class has this id there
        mates = np.flatnonzero(world.class_K == world.class_K[k])
        same = world.ids_KC[mates][:, world.layout.slice("rgb")] == world.ids_KC[k, world.layout.slice("rgb")]
        assert np.allclose(grid[k], -np.log(same.mean(0)), atol=1e-5)


def test_marginal_does_not_look(world):
    context = known_context(Marginal(world))
    assert np.array_equal(nll(context, ["audio"], "rgb"), nll(context, [], "rgb"))


def test_a_memoriser_has_no_idea_of_what_it_never_saw(tmp_path):
    half = np.arange(64)[np.arange(64) % 8 < 4]
    world = make_world(tmp_path, splits={"train": half, "val": half, "test": np.arange(64)})
    known = np.isin(np.arange(64), half)
    values = nll(known_context(Memoriser(world)), ["audio"], "rgb")
    assert np.abs(values[known]).max() < 1e-6 and np.allclose(values[~known], np.log(12), atol=1e-6)


def test_predictors_generate_through_the_sampler(world):
    context = known_context(Perfect(world), limit=12)
    for target in ("audio", "rgb", "caption"):
        state = context.generate([s for s in ("rgb", "caption") if s != target], [target], GenerateOptions(seed=3, guidance=1.0))
        part = world.layout.slice(target)
        same = np.where(world.inside_KC[:12, part], state.ids_BC[:, part] == world.ids_KC[:12, part], True)
        assert same.all() and torch.is_tensor(context.model.head.weight())
