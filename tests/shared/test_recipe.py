"""Recipes: what is wrong is told whole, before anything is built."""

from __future__ import annotations

import textwrap

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared import recipe
from shared.errors import RequestError

GOOD = """
# A recipe for tests.
task: {type: Segmentation}
data: {type: GeneratedScenes, count: 6, size: 64}
backbone: {type: TimmViT, name: vit_tiny_patch16_224, weights: random}
method: {type: LoRA, rank: 4}
head: {type: LightDecoder}
trainer: {steps: 2}
tiny: {method: {rank: 2}}
"""


@pytest.fixture
def written(tmp_path):
    def write(text: str = GOOD, name: str = "r.yaml") -> str:
        (tmp_path / name).write_text(textwrap.dedent(text))
        return str(tmp_path / name)

    return write


def problem(name: str, *overrides: str, **options) -> str:
    with pytest.raises(RequestError) as caught:
        recipe.load(name, overrides, **options)
    return str(caught.value)


def test_a_good_recipe_gives_checked_arguments(written):
    found = recipe.load(written())
    assert (found.name, found.seed) == ("r", 0)
    assert found.sections["method"].arguments == {"rank": 4}
    assert found.sections["method"].entry.name == "LoRA"
    assert found.sections["optimiser"].arguments == {}
    assert found.build("method").rank == 4
    assert "tiny" not in found.tree


def test_tiny_and_overrides_merge_deep_and_later_ones_win(written):
    path = written()
    assert recipe.load(path, tiny=True).tree["method"] == {"type": "LoRA", "rank": 2}
    assert recipe.load(path, ["method.rank=7", "method.rank=9"], tiny=True).tree["method"]["rank"] == 9
    learned = recipe.load(path, ["optimiser.learning_rate=1e-4", "seed=3", "method.depth=[0, 1]"])
    assert learned.build("optimiser").learning_rate == 1e-4
    assert learned.seed == 3
    assert learned.sections["method"].arguments["depth"] == [0, 1]


def test_a_changed_type_starts_the_section_empty(written):
    path = written()
    assert recipe.load(path, ["method.type=CloudAdapter"]).tree["method"] == {"type": "CloudAdapter"}
    changed = recipe.load(path, ["method.stages=2", "method.type=cloud_adapter"])
    assert changed.sections["method"].arguments == {"stages": 2}
    assert recipe.load(path, ["method.type=lora"]).sections["method"].arguments == {"rank": 4}
    assert recipe.load(path).replaced(method={"type": "Probe"}).tree["method"] == {"type": "Probe"}


def test_all_problems_are_told_at_once(written):
    message = problem(
        written(GOOD.replace("rank: 4", "rnak: 4, rank: '16', dropout: .nan")),
        "sead=1",
        "data.type=Generated",
        "seed=x",
    )
    head, *lines = message.splitlines()
    assert head.endswith("r.yaml: 6 problems")
    assert lines[0].startswith("  data.type: no data is called 'Generated'")
    assert lines[1:] == [
        "  method.rnak: LoRA has no such setting; nearest: 'rank'",
        "  method.rank: wants int, got '16'",
        "  method.dropout: wants float, got nan",
        "  sead: no such section; nearest: 'seed'",
        "  seed: wants an int from 0 to 2**32 - 1, got 'x'",
    ]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method.rank=true", "method.rank: wants int, got True"),
        ("method.rank=1.5", "method.rank: wants int, got 1.5"),
        ("method.roles=attention.query", "method.roles: wants Sequence[str], got 'attention.query'"),
        ("method.zzz=1", "method.zzz: LoRA has no such setting (it has: rank, alpha, dropout, roles, depth)"),
        ("optimiser.name=adam", "optimiser.name: wants Literal['adamw', 'sgd'], got 'adam'"),
        ("method=LoRA", "method: wants a mapping with a type and its settings, got 'LoRA'"),
        ("method.type=3", "method.type: wants the name of a method, got 3"),
        ("method.type=LoRa2", "method.type: no method is called 'LoRa2'; nearest: 'LoRA'"),
        ("data={type: FolderScenes, images: ., masks: .}", "data.classes: FolderScenes needs it (Sequence[str])"),
        ("data.type=LandsatBiome", "data.root: LandsatBiome needs it"),
        ("data={type: LandsatBiome, root: gone}", "data.root: no such file or folder: gone (paths are relative to "),
    ],
)
def test_one_problem_is_one_line_with_the_key_path(written, override, message):
    told = problem(written(), override)
    assert "\n" not in told
    assert message in told


def test_files_need_not_exist_where_they_are_not_read(written):
    assert recipe.load(written(), ["data={type: LandsatBiome, root: gone}"], files=False).outline().bands == 8


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task:\n  type: [", "bad YAML at line 2, column 10: "),
        ("task: {type: A}\nseed: 1\nseed: 2\n", "bad YAML at line 3, column 1: key 'seed' is given twice"),
        ("task: !!python/object:os.system {}", "bad YAML at line 1, column 7: could not determine a constructor"),
        ("- a\n", "a recipe is a mapping of sections, got list"),
        ("", "a recipe is a mapping of sections, got NoneType"),
        ("seed: 1", "data: this section is missing"),
        ("tiny: 3", "tiny: wants sections to override, got 3"),
        ("? [a]\n: b\n", "bad YAML at line 1, column 3: found unhashable key"),
    ],
)
def test_bad_files(written, text, message):
    assert message in problem(written(text))


def test_a_file_that_is_no_text(tmp_path):
    (tmp_path / "r.yaml").write_bytes(b"\xff\xfe\x00")
    assert "r.yaml: not a YAML text" in problem(str(tmp_path / "r.yaml"))


@pytest.mark.parametrize("item", ["method.rank", "=3", "method..rank=3", ".=1"])
def test_bad_overrides(written, item):
    assert problem(written(), item) == f"override {item!r}: write key.path=value, such as method.rank=16"


def test_an_override_that_is_no_yaml(written):
    assert "override 'method.rank=[1': the value is not YAML" in problem(written(), "method.rank=[1")


def test_unknown_recipes_and_tiny_without_a_section(written):
    assert "no recipe 'quickstrat': neither a file nor one of the project's; nearest: 'quickstart'" in problem(
        "quickstrat"
    )
    assert "it has no 'tiny' section" in problem(written(GOOD.replace("tiny:", "seed: 1 #")), tiny=True)


def test_a_class_that_refuses_its_settings_is_told_with_the_section(written):
    with pytest.raises(RequestError, match=r"r\.yaml: method: LoRA dropout 1\.5"):
        recipe.load(written(), ["method.dropout=1.5"]).build("method")


def test_the_resolved_text_gives_the_same_recipe_again(written):
    once = recipe.load(written(), ["optimiser.learning_rate=1e-5"], tiny=True)
    again = recipe.load(written(once.text(), "again.yaml"))
    assert again.tree == once.tree
    assert again.sections == once.sections


keys = st.sampled_from(["a", "b", "c"])
trees = st.recursive(st.integers(), lambda inner: st.dictionaries(keys, inner, max_size=3), max_leaves=8)
mappings = st.dictionaries(keys, trees, max_size=3)


@given(mappings, mappings)
def test_merging_keeps_what_is_not_overridden(tree, over):
    merged = recipe.merge(tree, over)
    assert recipe.merge(merged, over) == merged
    assert recipe.merge(tree, {}) == tree
    assert merged.keys() == tree.keys() | over.keys()
    for key in tree.keys() - over.keys():
        assert merged[key] == tree[key]


@given(st.dictionaries(keys, st.one_of(st.integers(), st.booleans(), st.lists(st.integers())), min_size=1))
def test_overrides_spell_the_values_they_are_given(values):
    assert recipe.parse(f"x.{key}={value}" for key, value in values.items()) == {"x": values}
