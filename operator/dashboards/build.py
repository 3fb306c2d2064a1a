"""Write the chart's Grafana dashboards with Grafana's own builders: `python operator/dashboards/build.py FOLDER`.

`--check` compares instead of writing. Each panel is a row of a table below: title, unit of Grafana, query, legend.
"""

import sys
from collections.abc import Iterable

from grafana_foundation_sdk.builders import common, prometheus, stat, table, timeseries
from grafana_foundation_sdk.builders import dashboard as dashboards
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import (
    BigValueColorMode,
    BigValueGraphMode,
    LegendDisplayMode,
    LegendPlacement,
    VisibilityMode,
)
from grafana_foundation_sdk.models.dashboard import DataSourceRef, VariableRefresh
from internvl_api.generated import generate

Panel = tuple[str, str, str, str]  # title, unit, PromQL, legend

SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
_NAMESPACES = 'job_namespace=~"$namespace"'
_EACH = "{{job_namespace}}/{{job_name}}"  # legend
_RUN = 'job_namespace="$namespace", job_name="$run"'

# Numbers at the top of a dashboard, six in a row.
RUNS_NUMBERS: list[Panel] = [
    (phase, "none", f'sum(internvl_job_phase{{{_NAMESPACES}, phase="{phase}"}}) or vector(0)', "")
    for phase in ("Running", "Pending", "Stalled", "Suspended", "Failed", "Succeeded")
]
RUN_NUMBERS: list[Panel] = [
    ("Progress", "percentunit", f"internvl_job_step{{{_RUN}}} / internvl_job_total_steps{{{_RUN}}}", ""),
    ("Loss", "none", f"internvl_job_loss{{{_RUN}}}", ""),
    ("Tokens per second", "none", f"sum(internvl_train_tokens_per_second{{{_RUN}}})", ""),
    ("Attempt", "none", f"internvl_job_attempt{{{_RUN}}}", ""),
    ("Since the last progress", "s", f"time() - internvl_job_progress_timestamp_seconds{{{_RUN}}}", ""),
    ("Age of the checkpoint", "s", f"time() - internvl_job_checkpoint_timestamp_seconds{{{_RUN}}}", ""),
]
OPERATOR_NUMBERS: list[Panel] = [
    ("Active replicas", "none", "sum(internvl_operator_leader)", ""),
    ("Runs", "none", "sum(internvl_operator_jobs)", ""),
    ("Queue", "none", "sum(internvl_operator_queue_depth)", ""),
    (
        "Failed passes in an hour",
        "none",
        "sum(increase(internvl_operator_reconcile_errors_total[1h])) or vector(0)",
        "",
    ),
    ("Oldest watch", "s", "max(internvl_operator_watch_age_seconds)", ""),
    ("Delay of the event loop", "s", "max(internvl_operator_event_loop_lag_seconds)", ""),
]

# Curves, two in a row.
RUNS_CURVES: list[Panel] = [
    ("Runs by phase", "none", f"sum by (phase) (internvl_job_phase{{{_NAMESPACES}}})", "{{phase}}"),
    ("Loss", "none", f"internvl_job_loss{{{_NAMESPACES}}}", _EACH),
    ("Progress", "percentunit",
     f"internvl_job_step{{{_NAMESPACES}}} / internvl_job_total_steps{{{_NAMESPACES}}}", _EACH),
    ("Restarts in an hour", "none",
     f"sum by (job_namespace, job_name) (delta(internvl_job_restarts{{{_NAMESPACES}}}[1h]))", _EACH),
    ("Time without progress", "s",
     f"time() - internvl_job_progress_timestamp_seconds{{{_NAMESPACES}}}", _EACH),
    ("Nodes that runs avoid", "none", f"internvl_job_avoided_nodes{{{_NAMESPACES}}} > 0", _EACH),
]  # fmt: skip
RUN_CURVES: list[Panel] = [
    ("Training loss", "none", f"internvl_train_loss{{{_RUN}}} and on (instance) internvl_train_step{{{_RUN}}} > 0",
     "training"),
    ("Loss on the validation data", "none", f"internvl_train_validation_loss{{{_RUN}}} > 0", "validation"),
    ("Loss by dataset", "none", f"internvl_train_dataset_loss{{{_RUN}}}", "{{dataset}}"),
    ("Learning rate", "none", f"max(internvl_train_learning_rate{{{_RUN}}})", "learning rate"),
    ("Norm of the gradients", "none", f"max(internvl_train_gradient_norm{{{_RUN}}})", "norm"),
    ("Tokens per second", "none", f"max(internvl_train_tokens_per_second{{{_RUN}}})", "all ranks"),
    ("Time of a step", "s",
     f"histogram_quantile(0.5, sum by (le) (rate(internvl_train_step_seconds_bucket{{{_RUN}}}[5m])))", "median"),
    ("Share of time waiting for data", "percentunit",
     f"rate(internvl_train_data_wait_seconds_total{{{_RUN}}}[5m])", "{{instance}}"),
    ("Time of a checkpoint", "s", f"max(internvl_train_checkpoint_seconds{{{_RUN}}})", "checkpoint"),
    ("Restarts", "none", f"internvl_job_restarts{{{_RUN}}}", "{{cause}}"),
]  # fmt: skip
OPERATOR_CURVES: list[Panel] = [
    ("Time of a pass", "s",
     "histogram_quantile(0.99, sum by (le) (rate(internvl_operator_reconcile_seconds_bucket[5m])))", "99 of 100"),
    ("From a run's creation to its first pod", "s",
     "histogram_quantile(0.99, sum by (le) (increase(internvl_operator_first_pod_seconds_bucket[1h])))", "99 of 100"),
    ("Writes per second", "reqps",
     "sum by (kind, verb) (rate(internvl_operator_api_writes_total[5m]))", "{{verb}} {{kind}}"),
    ("Refused writes per second", "reqps",
     'sum by (kind, result) (rate(internvl_operator_api_writes_total{result!="ok"}[5m]))', "{{kind}}: {{result}}"),
    ("Failed passes per second", "none",
     "sum by (cause) (rate(internvl_operator_reconcile_errors_total[5m]))", "{{cause}}"),
    ("Ended attempts in an hour", "none",
     "sum by (cause) (increase(internvl_operator_restarts_total[1h]))", "{{cause}}"),
    ("Memory", "bytes", 'process_resident_memory_bytes and on (instance) internvl_operator_leader', "{{instance}}"),
    ("Events that were dropped", "none", "sum(increase(internvl_operator_events_dropped_total[1h]))", "dropped"),
]  # fmt: skip


def _query(panel: Panel) -> prometheus.Dataquery:
    _, _, expression, legend = panel
    return prometheus.Dataquery().expr(expression).legend_format(legend).ref_id("A")


def _number(panel: Panel) -> stat.Panel:
    title, unit, _, _ = panel
    shown = stat.Panel().title(title).unit(unit).datasource(SOURCE).with_target(_query(panel)).span(4).height(4)
    return shown.graph_mode(BigValueGraphMode.NONE).color_mode(BigValueColorMode.NONE)


def _curve(panel: Panel) -> timeseries.Panel:
    title, unit, _, _ = panel
    legend = common.VizLegendOptions().display_mode(LegendDisplayMode.LIST).placement(LegendPlacement.BOTTOM)
    drawn = timeseries.Panel().title(title).unit(unit).datasource(SOURCE).with_target(_query(panel))
    return drawn.span(12).height(8).legend(legend.show_legend(True)).show_points(VisibilityMode.NEVER)


def _dashboard(name: str, title: str, numbers: Iterable[Panel], curves: Iterable[Panel]) -> dashboards.Dashboard:
    built = dashboards.Dashboard(title).uid(f"internvl-{name}").tags(["internvl"]).refresh("30s").time("now-6h", "now")
    built = built.with_variable(dashboards.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
    for panel in numbers:
        built = built.with_panel(_number(panel))
    for panel in curves:
        built = built.with_panel(_curve(panel))
    return built


def _variable(name: str, label: str, query: str, *, several: bool) -> dashboards.QueryVariable:
    variable = dashboards.QueryVariable(name).label(label).query(query).datasource(SOURCE)
    return variable.refresh(VariableRefresh.ON_TIME_RANGE_CHANGED).multi(several).include_all(several)


def _phases() -> table.Panel:
    """The runs of the chosen namespaces, each with its phase."""
    query = prometheus.Dataquery().expr(f"internvl_job_phase{{{_NAMESPACES}}} == 1").instant().ref_id("A")
    return (
        table.Panel()
        .title("Phase of each run")
        .datasource(SOURCE)
        .with_target(query)
        .span(24)
        .height(9)
        .show_header(True)
    )


def build() -> dict[str, str]:
    """File name -> JSON of each dashboard."""
    namespace = "label_values(internvl_job_phase, job_namespace)"
    runs = _dashboard("runs", "InternVL runs", RUNS_NUMBERS, RUNS_CURVES).with_panel(_phases())
    runs = runs.with_variable(_variable("namespace", "Namespace", namespace, several=True))
    run = _dashboard("run", "InternVL run", RUN_NUMBERS, RUN_CURVES)
    run = run.with_variable(_variable("namespace", "Namespace", namespace, several=False))
    names = 'label_values(internvl_job_phase{job_namespace="$namespace"}, job_name)'
    run = run.with_variable(_variable("run", "Run", names, several=False))
    operator = _dashboard("operator", "InternVL operator", OPERATOR_NUMBERS, OPERATOR_CURVES)
    built = {"runs": runs, "run": run, "operator": operator}
    return {
        f"{name}.json": JSONEncoder(sort_keys=True, indent=1).encode(each.build()) + "\n"
        for name, each in built.items()
    }


def main() -> int:
    """Write the chart's Grafana dashboards into the folder; with `--check` fail when one is out of date."""
    return generate(main.__doc__, lambda folder: {folder / name: text for name, text in build().items()})


if __name__ == "__main__":
    sys.exit(main())
