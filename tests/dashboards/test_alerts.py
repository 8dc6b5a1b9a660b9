"""When each alert fires and when it does not, by promtool on the rules as they are shipped."""

import subprocess

import pytest
from promtool_cases import ENGINE, TARGET, Case, Fired, labelled, run, scores, series, steady
from steerscope.export import instruments as names
from steerscope_dashboards.alerts import VLLM_RUNNING, alerts

pytestmark = pytest.mark.timeout(180)

MODEL = {"model_name": "org/model"}
OVERVIEW, STEERING, PIPELINE = (f"steerscope-{n}" for n in ("overview", "steering", "pipeline"))


def burning(window: str, share: str, factor: str, severity: str) -> Fired:
    return Fired(
        {**MODEL, "severity": severity, "window": window},
        "org/model: the quality objective is being missed.",
        f"{share} of the sequences scored in the last {window} have hallucination_risk above 0.9; "
        f"the objective allows 5%, and its budget of 30 days burns at more than {factor} times "
        "the rate that makes it last.",
        OVERVIEW,
    )


def excess(percent: int, minutes: int = 400, per_minute: float = 10.0) -> dict[str, str]:
    below = per_minute * (100 - percent) / 100
    return scores(steady(below, minutes), steady(per_minute, minutes))


def asked(policy: str, **per_minute: float) -> dict[str, str]:
    return {
        series(names.STEERING_REQUESTS.name, policy=policy, outcome=outcome): steady(count)
        for outcome, count in per_minute.items()
    }


def tokens(observed: float, unobserved: float) -> dict[str, str]:
    return {
        series(names.OBSERVED_TOKENS.name, **ENGINE, phase="prompt"): steady(observed),
        series(names.UNOBSERVED_TOKENS.name, **ENGINE, reason="dropped_frame"): steady(unobserved),
    }


def frames(received: float, dropped: float) -> dict[str, str]:
    return {
        series(names.FRAMES.name, **ENGINE): steady(received),
        series(names.FRAMES_DROPPED.name, **ENGINE, reason="not_sent"): steady(dropped),
        series(names.FRAMES_DROPPED.name, reason="malformed"): steady(0),
    }


def lag(on_time: float, all_frames: float) -> dict[str, str]:
    return {
        series(f"{names.READOUT_LAG.name}_bucket", **ENGINE, le="1.0"): steady(on_time),
        series(f"{names.READOUT_LAG.name}_count", **ENGINE): steady(all_frames),
        series(names.FRAMES.name, **ENGINE): steady(all_frames),
    }


def silence(seconds: str, running: str) -> dict[str, str]:
    at_vllm = {"job": "vllm", "instance": "vllm:8000"}
    return {
        series(names.ENGINE_LAST_SEEN.name, **ENGINE): seconds,
        series(VLLM_RUNNING, **{**ENGINE, **at_vllm}): running,
    }


def drift(psi: str, tokens: str) -> dict[str, str]:
    labels = {**ENGINE, "feature": "known_entity", "phase": "prompt"}
    return {
        series(names.FEATURE_DRIFT_PSI.name, **labels): psi,
        series(names.FEATURE_DRIFT_TOKENS.name, **labels): tokens,
        # Far off, but too few tokens, on another engine.
        series(names.FEATURE_DRIFT_PSI.name, **{**labels, "engine": "1"}): "9x60",
        series(names.FEATURE_DRIFT_TOKENS.name, **{**labels, "engine": "1"}): "1500x60",
    }


def passed(*checks: str) -> dict[str, str]:
    """When each check passed last; promtool's clock begins at 0."""
    return {
        series(names.CANARY_LAST_SUCCESS.name, canary=f"check-{number}"): last
        for number, last in enumerate(checks)
    }


HEARTBEAT = Fired(
    {"severity": "none"},
    "Every check of the canary passed lately.",
    "All is well as long as this fires: from a feature in the model to whoever is told. Somebody "
    "has to be told when it does not.",
    PIPELINE,
)


def failing(check: str, ago: str) -> Fired:
    return Fired(
        {**TARGET, "canary": check, "severity": "warning"},
        f"hub:9464: the canary's check {check} does not pass.",
        f"It last passed {ago} ago. Until it does, do not believe the signals, nor the silence of "
        "alerts about them.",
        PIPELINE,
    )


def override(in_force: str) -> dict[str, str]:
    return {
        series(names.STEERING_OVERRIDE.name, mode=mode): f"{int(mode == in_force)}x60"
        for mode in ("none", "off", "force")
    }


CASES = (
    Case(
        "half of the answers are in the worst band",
        "SteerscopeHallucinationRiskHigh",
        "30m",
        labelled(high=5, low=5),
        [
            Fired(
                {**MODEL, "severity": "warning"},
                "org/model: many answers look made up.",
                "50% of the sequences scored in the last 15m have hallucination_risk 'high'.",
                OVERVIEW,
            )
        ],
    ),
    Case(
        "a tenth is nothing unusual",
        "SteerscopeHallucinationRiskHigh",
        "30m",
        labelled(high=1, low=9),
    ),
    Case(
        "too few sequences to judge",
        "SteerscopeHallucinationRiskHigh",
        "60m",
        labelled(high=1.5, low=0),
    ),
    Case(
        "sequences without a score are not judged",
        "SteerscopeHallucinationRiskHigh",
        "30m",
        labelled(high=2, low=9, unobserved=50, not_applicable=50),
    ),
    Case(
        "another signal's high is not a risk",
        "SteerscopeHallucinationRiskHigh",
        "30m",
        labelled("known_entity_confidence", high=10),
    ),
    Case(
        "it waits before it tells anybody",
        "SteerscopeHallucinationRiskHigh",
        "3m",
        labelled(high=20, low=20),
    ),
    Case(
        "nearly all answers are at risk: every pair of windows says so",
        "SteerscopeHallucinationRiskRising",
        "70m",
        excess(90),
        [
            burning("1h", "90%", "14.4", "critical"),
            burning("6h", "90%", "6", "critical"),
            burning("1d", "90%", "3", "warning"),
            burning("3d", "90%", "1", "warning"),
        ],
    ),
    Case(
        "two fifths burn the budget within days, not hours",
        "SteerscopeHallucinationRiskRising",
        "6h",
        excess(40),
        [
            burning("6h", "40%", "6", "critical"),
            burning("1d", "40%", "3", "warning"),
            burning("3d", "40%", "1", "warning"),
        ],
    ),
    Case(
        "a tenth is for the next working day",
        "SteerscopeHallucinationRiskRising",
        "6h",
        excess(10),
        [burning("3d", "10%", "1", "warning")],
    ),
    Case(
        "what the objective allows is allowed",
        "SteerscopeHallucinationRiskRising",
        "6h",
        excess(4),
    ),
    Case(
        "a bad hour that is over for six pages nobody, though three days remember it",
        "SteerscopeHallucinationRiskRising",
        "440m",
        scores("0+1x60 70+10x400", "0+10x461"),
    ),
    Case(
        "a burst of ten minutes after quiet hours pages nobody",
        "SteerscopeHallucinationRiskRising",
        "310m",
        scores("0+10x300 3001+1x20", "0+10x321"),
    ),
    Case(
        "a handful of sequences burns nothing",
        "SteerscopeHallucinationRiskRising",
        "70m",
        excess(90, per_minute=0.2),
    ),
    Case(
        "a third of the sequences has no score",
        "SteerscopeSignalUnscored",
        "40m",
        labelled(low=10, unobserved=5),
        [
            Fired(
                {**MODEL, "signal": "hallucination_risk", "severity": "warning"},
                "org/model: hallucination_risk is missing for many requests.",
                "33.33% of the sequences finished in the last 15 minutes have no score: tokens "
                "that the signal needs were not observed.",
                OVERVIEW,
            )
        ],
    ),
    Case(
        "a signal that does not apply is not missing",
        "SteerscopeSignalUnscored",
        "40m",
        labelled(low=5, unobserved=0, not_applicable=50),
    ),
    Case(
        "too few sequences to judge",
        "SteerscopeSignalUnscored",
        "40m",
        labelled(low=0, unobserved=1),
    ),
    Case(
        "a policy that nobody declared steers",
        "SteerscopeSteeringUnexpected",
        "10m",
        {
            series(
                names.STEERING_REQUESTS.name, **ENGINE, policy="force-known", outcome="applied"
            ): steady(4)
        },
        [
            Fired(
                {**MODEL, "policy": "force-known", "severity": "warning"},
                "org/model: policy force-known steers traffic.",
                "About 20 sequences of the last 5 minutes were steered by a policy that is not "
                "among those declared as expected.",
                STEERING,
            )
        ],
    ),
    Case(
        "a policy in force that nobody uses",
        "SteerscopeSteeringUnexpected",
        "10m",
        {
            series(
                names.STEERING_REQUESTS.name, **ENGINE, policy="force-known", outcome="applied"
            ): steady(0)
        },
    ),
    Case(
        "what was asked for and refused steers nothing",
        "SteerscopeSteeringUnexpected",
        "10m",
        asked("force-known", admitted=0, rejected=9),
    ),
    Case(
        "a quarter of the requests is refused",
        "SteerscopeSteeringRejected",
        "30m",
        asked("force-known", admitted=3, rejected=1),
        [
            Fired(
                {"policy": "force-known", "severity": "warning"},
                "Steering by force-known is being refused.",
                "25% of the requests that asked for it in the last 15 minutes got an error "
                "instead of an answer.",
                STEERING,
            )
        ],
    ),
    Case(
        "a typing error now and then",
        "SteerscopeSteeringRejected",
        "30m",
        asked("force-known", admitted=50, rejected=1),
    ),
    Case(
        "one refusal of a policy that is hardly used",
        "SteerscopeSteeringRejected",
        "30m",
        asked("force-known", admitted=0, rejected=1),
    ),
    Case(
        "a twentieth of the tokens is unobserved",
        "SteerscopeCoverageLow",
        "30m",
        tokens(9500, 500),
        [
            Fired(
                {**ENGINE, "severity": "warning"},
                "org/model, engine 0: tokens go unobserved.",
                "Only 95% of the tokens were observed; signals are about the rest of the traffic "
                "only.",
                PIPELINE,
            )
        ],
    ),
    Case("nearly all are observed", "SteerscopeCoverageLow", "30m", tokens(9950, 50)),
    Case("too few tokens to judge", "SteerscopeCoverageLow", "30m", tokens(100, 900)),
    Case(
        "nobody is scraped",
        "SteerscopeTelemetryAbsent",
        "10m",
        {"up": "1x10"},
        [
            Fired(
                {"severity": "critical"},
                "No Steerscope hub is being scraped.",
                "All signals are missing, and no other Steerscope alert can fire. Serving itself "
                "does not need the hub.",
                PIPELINE,
            )
        ],
    ),
    Case(
        "a hub that went away and stays away",
        "SteerscopeTelemetryAbsent",
        "20m",
        {series(names.BUILD_INFO.name, version="1"): "1x5 stale"},
        [
            Fired(
                {"severity": "critical"},
                "No Steerscope hub is being scraped.",
                "All signals are missing, and no other Steerscope alert can fire. Serving itself "
                "does not need the hub.",
                PIPELINE,
            )
        ],
    ),
    Case(
        "an idle hub is there",
        "SteerscopeTelemetryAbsent",
        "20m",
        {series(names.BUILD_INFO.name, version="1"): "1x60"},
    ),
    Case(
        "a hub that restarts",
        "SteerscopeTelemetryAbsent",
        "10m",
        {series(names.BUILD_INFO.name, version="1"): "1x5 stale _x2 1x60"},
    ),
    Case(
        "vLLM works and no frame comes",
        "SteerscopeEngineSilent",
        "20m",
        silence("0+60x60", "3x60"),
        [
            Fired(
                {**ENGINE, "severity": "critical"},
                "org/model, engine 0: works unobserved.",
                "vLLM says that requests are running, but no frame of this engine has come for "
                "20m 0s.",
                PIPELINE,
            )
        ],
    ),
    Case("an idle engine is silent", "SteerscopeEngineSilent", "60m", silence("0+60x60", "0x60")),
    Case(
        "an engine that works and is heard",
        "SteerscopeEngineSilent",
        "60m",
        silence("1x60", "3x60"),
    ),
    Case(
        "a fiftieth of the frames is lost",
        "SteerscopeFramesDropped",
        "30m",
        frames(980, 20),
        [
            Fired(
                {**TARGET, "severity": "warning"},
                "hub:9464: frames are being lost.",
                "2% of the frames of the last 10 minutes never counted; their tokens are "
                "unobserved.",
                PIPELINE,
            )
        ],
    ),
    Case("a frame in a thousand", "SteerscopeFramesDropped", "30m", frames(999, 1)),
    Case("too few frames to judge", "SteerscopeFramesDropped", "30m", frames(1, 1)),
    Case(
        "a tenth of the frames is late",
        "SteerscopeReadoutLagHigh",
        "30m",
        lag(90, 100),
        [
            Fired(
                {**ENGINE, "severity": "warning"},
                "org/model, engine 0: telemetry is late.",
                "10% of the frames took more than 1 s to reach the hub.",
                PIPELINE,
            )
        ],
    ),
    Case("few are late", "SteerscopeReadoutLagHigh", "30m", lag(98, 100)),
    Case("too few frames to judge", "SteerscopeReadoutLagHigh", "30m", lag(1, 2)),
    Case(
        "the hub's loop never rests",
        "SteerscopeHubSaturated",
        "30m",
        {series(names.HUB_CPU.name): steady(57)},
        [
            Fired(
                {**TARGET, "severity": "warning"},
                "hub:9464: the hub has no time left.",
                "It uses 95% of the one processor that its loop can use; frames will be late, "
                "then lost.",
                PIPELINE,
            )
        ],
    ),
    Case(
        "a busy hub",
        "SteerscopeHubSaturated",
        "30m",
        {series(names.HUB_CPU.name): steady(48)},
    ),
    Case(
        "a hub crashed and came back",
        "SteerscopeHubRestarted",
        "20m",
        {series(names.HUB_RESTARTS.name): "0x10 2x60"},
        [
            Fired(
                {**TARGET, "severity": "warning"},
                "hub:9464: the hub ended and was started again.",
                "About 2 times within the last hour; what was in flight then is unobserved.",
                PIPELINE,
            )
        ],
    ),
    Case(
        "a hub that restarted long ago",
        "SteerscopeHubRestarted",
        "2h",
        {series(names.HUB_RESTARTS.name): "0x10 2x200"},
    ),
    Case(
        "all steering is switched off",
        "SteerscopeOverrideInForce",
        "10m",
        override("off"),
        [
            Fired(
                {"mode": "off", "severity": "warning"},
                "The operator's override is in force: off.",
                "It beats every policy, rule and request, for everything that is served.",
                STEERING,
            )
        ],
    ),
    Case("there is no override", "SteerscopeOverrideInForce", "10m", override("none")),
    Case(
        "a front end did not confirm",
        "SteerscopePolicyPropagationSlow",
        "10m",
        {series(names.PROPAGATION_TIMEOUTS.name): "0x5 1x60"},
        [
            Fired(
                {**TARGET, "severity": "warning"},
                "hub:9464: a policy change was not confirmed in time.",
                "A front end that is connected did not confirm a change of policies within the "
                "last 15 minutes; it may still resolve names as they were before.",
                STEERING,
            )
        ],
    ),
    Case(
        "all of them confirmed",
        "SteerscopePolicyPropagationSlow",
        "10m",
        {series(names.PROPAGATION_TIMEOUTS.name): "0x60"},
    ),
    Case(
        "it is over when a quarter of an hour went by",
        "SteerscopePolicyPropagationSlow",
        "40m",
        {series(names.PROPAGATION_TIMEOUTS.name): "0x5 1x60"},
    ),
    Case(
        "a feature is far from its baseline",
        "SteerscopeFeatureDrift",
        "30m",
        drift("0.4x60", "9000x60"),
        [
            Fired(
                {
                    **MODEL,
                    "feature": "known_entity",
                    "phase": "prompt",
                    "severity": "warning",
                },
                "org/model: known_entity is not what it was calibrated on.",
                "On an engine, its activations in prompt are 0.40 (population stability index) "
                "from the catalog's baseline.",
                "steerscope-feature",
            )
        ],
    ),
    Case("a shift to look at", "SteerscopeFeatureDrift", "60m", drift("0.2x60", "9000x60")),
    Case("too few tokens to judge", "SteerscopeFeatureDrift", "60m", drift("0.4x60", "1999x60")),
    Case("it is new", "SteerscopeFeatureDrift", "14m", drift("0.4x60", "9000x60")),
    Case(
        "a shift that ended",
        "SteerscopeFeatureDrift",
        "40m",
        drift("0.4x30 0.1x30", "9000x60"),
    ),
    Case(
        "no feature has a baseline",
        "SteerscopeFeatureDrift",
        "60m",
        {series(names.BUILD_INFO.name, version="1"): "1x60"},
    ),
    Case(
        "a check passed for a while, then no more",
        "SteerscopeCanaryFailing",
        "40m",
        passed("0+60x20 1200x60", "0+60x60"),
        [failing("check-0", "20m 0s")],
    ),
    Case(
        "no check ever passed",
        "SteerscopeCanaryFailing",
        "20m",
        passed("0x60", "0x60"),
        [failing("check-0", "20m 0s"), failing("check-1", "20m 0s")],
    ),
    Case("all pass", "SteerscopeCanaryFailing", "40m", passed("0+60x60", "0+60x60")),
    Case(
        "a few runs in a row did not pass",
        "SteerscopeCanaryFailing",
        "40m",
        passed("0+60x20 1200x7 1680+60x60"),
    ),
    Case("a server that loads", "SteerscopeCanaryFailing", "14m", passed("0x60")),
    Case(
        "no canary is configured",
        "SteerscopeCanaryFailing",
        "60m",
        {series(names.BUILD_INFO.name, version="1"): "1x60"},
    ),
    Case("all pass", "SteerscopeHeartbeat", "40m", passed("0+60x60", "0+60x60"), [HEARTBEAT]),
    Case(
        "one check of two does not pass",
        "SteerscopeHeartbeat",
        "40m",
        passed("0+60x60", "0+60x20 1200x60"),
    ),
    Case("one check of two never passed", "SteerscopeHeartbeat", "40m", passed("0+60x60", "0x60")),
    Case(
        "nobody is scraped any more",
        "SteerscopeHeartbeat",
        "40m",
        passed("0+60x35 stale"),
    ),
    Case(
        "no canary is configured",
        "SteerscopeHeartbeat",
        "60m",
        {series(names.BUILD_INFO.name, version="1"): "1x60"},
    ),
)


@pytest.fixture(scope="module")
def rules(prometheus_tools, generated):
    return sorted(generated.glob("*.rules.yaml"))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_alert_does_as_the_case_says(case, rules, tmp_path):
    assert run([case], rules, tmp_path) == ""


def test_every_alert_is_seen_to_fire_and_not_to_fire(shipped):
    every = {alert.name for alert in alerts(shipped)}
    assert {case.alert for case in CASES if case.fired} == every
    assert {case.alert for case in CASES if not case.fired} == every


def test_a_case_that_does_not_hold_is_noticed(rules, tmp_path):
    idle = Case("nothing", "SteerscopeHubSaturated", "10m", {"up": "1x10"}, CASES[0].fired)
    assert "SteerscopeHubSaturated" in run([idle], rules, tmp_path)


def test_promtool_accepts_the_rules(rules):
    done = subprocess.run(
        ["promtool", "check", "rules", "--lint-fatal", *map(str, rules)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
