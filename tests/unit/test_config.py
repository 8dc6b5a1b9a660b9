import pytest
import yaml
from steerscope import config
from steerscope.catalog import store
from steerscope.cli.main import main
from steerscope.errors import ConfigError
from steerscope.steering.policies import check_declared


def write(path, tree):
    path.write_text(yaml.safe_dump(tree))
    return path


def test_settings_are_read_with_their_defaults_and_an_absolute_catalog(tiny_world, tmp_path):
    (tmp_path / "cat").symlink_to(tiny_world.catalog)
    settings = config.load_file(write(tmp_path / "c.yaml", {"catalog": "cat"}))
    assert settings.catalog == str(tiny_world.catalog)
    assert settings.hub.grpc_address == "127.0.0.1:50051"
    assert settings.hub.http_address == "127.0.0.1:9464"


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (None, "Expected `object`"),
        ([], "Expected `object`"),
        ({}, "missing required field `catalog`"),
        ({"catalog": "none"}, "no folder"),
        ({"catalog": ".", "hubs": {}}, "unknown field `hubs`"),
        ({"catalog": ".", "hub": {"http_address": "9464"}}, "hub.http_address"),
        ({"catalog": ".", "steering": {"max_rows_per_request": 0}}, "max_rows_per_request"),
        ({"catalog": ".", "policies": [{"name": "Bad!", "interventions": []}]}, "name"),
    ],
)
def test_a_bad_tree_is_refused_with_its_path(tmp_path, tree, message):
    path = write(tmp_path / "c.yaml", tree)
    with pytest.raises(ConfigError, match=message):
        config.load_file(path)


def test_a_missing_or_malformed_file_is_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match=r"gone\.yaml: No such file"):
        config.load_file(tmp_path / "gone.yaml")
    (tmp_path / "c.yaml").write_bytes(b"\xff\xfe: [")
    with pytest.raises(ConfigError, match=r"c\.yaml"):
        config.load_file(tmp_path / "c.yaml")


def test_settings_travel_as_plain_data(tiny_world):
    settings = config.load_file(tiny_world.config)
    tree = {config.ADDITIONAL_CONFIG_KEY: config.to_tree(settings)}
    assert config.discover(tree, environ={}) == settings


def test_additional_config_goes_before_the_environment(tiny_world, tmp_path):
    tree = {config.ADDITIONAL_CONFIG_KEY: {"catalog": str(tiny_world.catalog)}}
    settings = config.discover(tree, environ={config.CONFIG_ENV: str(tmp_path / "none")})
    assert settings.catalog == str(tiny_world.catalog)


def test_without_either_nothing_is_configured():
    assert config.discover({}, environ={}) is None
    assert not config.is_configured({})


def test_check_prints_what_a_good_config_names(tiny_world, capsys):
    assert main(["check", str(tiny_world.config), "--model", str(tiny_world.model)]) == 0
    assert "resid_post.1  latent_1, unit_1, direction_1, probe_1" in capsys.readouterr().out


def test_check_tells_a_fault_in_one_line_and_fails(tiny_world, tmp_path, capsys):
    tree = {
        "catalog": str(tiny_world.catalog),
        "policies": [{"name": "push", "interventions": [{"feature": "unit_1", "add": 1.0}]}],
    }
    assert main(["check", str(write(tmp_path / "c.yaml", tree))]) == 2
    assert capsys.readouterr().err == "steerscope: policy 'push' is declared 2 times\n"


@pytest.mark.parametrize(
    ("rules", "reason"),
    [
        ({"default_policy": "nobody"}, "rules.default_policy: no policy 'nobody' is declared"),
        ({"default_policy": "Not A Name"}, r"\$\.rules\.default_policy"),
        (
            {"bindings": [{"name": "b", "match": {"headers": {"x-team": "1"}}}]},
            r"rules\.bindings\[0\]\.match\.headers: 'x-team' is not looked at",
        ),
        ({"override": {"mode": "force"}}, "rules.override.policy: mode force needs one"),
        ({"override": {"mode": "of"}}, r"\$\.rules\.override\.mode"),
    ],
)
def test_declared_rules_are_checked_before_anything_starts(tiny_world, tmp_path, rules, reason):
    tree = {"catalog": str(tiny_world.catalog), "rules": rules}

    def checked():
        settings = config.from_tree(tree, base=tmp_path, where="here")
        check_declared(store.load(tiny_world.catalog), settings)

    with pytest.raises(ConfigError, match=reason):
        checked()
