"""A chain of runs as a saved W&B workspace and a report: python -m launch.online.panels, a chain as JSON as its input.

Both are found again by names that follow from the experiment, so that a second call updates them, whoever
makes it. Panels and blocks are built with wandb-workspaces; saving is our own, as its `save` makes a new view
under a random name each time.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from hashlib import sha256
from typing import Any

from launch.operating.ledger import ALLOCATED
from launch.tracking import safe

STEP = "train/step"
TRAINING = (
    ("learning rate", ["train/lr"]),
    ("gradient norm", ["train/grad_norm"]),
    ("samples a second", ["train/samples_per_second"]),
    ("step time", [f"train/step_seconds_p{share}" for share in (50, 95, 99)]),
    ("model FLOPs used", ["train/mfu"]),
    ("memory, GB", ["train/gpu_memory_max_gb", "train/rss_gb"]),
    ("padding", ["train/padding"]),
)
ROUTER = (
    ("largest and smallest share of an expert", ["moe/max_share", "moe/min_share"]),
    ("evenness", ["moe/entropy"]),
    ("choices dropped", ["moe/dropped"]),
    ("balancing loss", ["train/aux"]),
)
SPENT = [f"goodput/{part}_seconds" for part in ("queue", *ALLOCATED)]

FIND = """query FindView($entity: String, $project: String, $kind: String, $name: String) {
  project(name: $project, entityName: $entity) {
    allViews(viewType: $kind, viewName: $name) { edges { node { id name } } }
  }
}"""
SAVE = """mutation SaveView($id: ID, $entity: String, $project: String, $kind: String, $name: String, $title: String,
    $description: String, $spec: String) {
  upsertView(input: {id: $id, entityName: $entity, projectName: $project, type: $kind, name: $name,
      displayName: $title, description: $description, spec: $spec, createdUsing: WANDB_SDK}) {
    view { id name } inserted
  }
}"""


class PanelsError(Exception):
    """It cannot be saved; the text says why."""


def workspace(chain: dict[str, Any]) -> Any:
    """The workspace's model: loss by stage, router balance, goodput and lineage, of the chain's runs alone."""
    import wandb_workspaces.workspaces as ws
    from wandb_workspaces import expr

    sections = [
        ("Loss by stage", [_line("loss", ["train/loss"]), _line("cross entropy", ["train/ce"])]),
        ("Training", [_line(title, names) for title, names in TRAINING]),
        ("Router balance", [_line(title, names) for title, names in ROUTER]),
        ("Goodput", _goodput()),
        ("Held-out answers", [_table("held_out/answers")]),
        ("Lineage", [_markdown(lineage(chain))]),
    ]
    axis = ws.SectionPanelSettings(x_axis=STEP)
    made = ws.Workspace(
        entity=chain["entity"],
        project=chain["project"],
        name=f"{chain['experiment']}: stages",
        sections=[
            ws.Section(name=name, panels=panels, is_open=True, panel_settings=axis)
            for name, panels in sections
        ],
        settings=ws.WorkspaceSettings(x_axis=STEP, max_runs=100),
        runset_settings=ws.RunsetSettings(
            filters=[expr.Metric("Group").isin(_experiments(chain))], groupby=[expr.Metric("JobType")]
        ),
    )
    return made._to_model()


def report(chain: dict[str, Any]) -> Any:
    """The report's model: a section a stage, each with that stage's runs."""
    import wandb_workspaces.reports.v2 as wr
    from wandb_workspaces import expr

    def runs(experiment: str) -> Any:
        names = {"entity": chain["entity"], "project": chain["project"], "name": experiment}
        return wr.Runset(**names, filters=[expr.Metric("Group") == experiment])

    again = f"`launch/runs.py dashboard {chain['experiment']}` brings this up to date."
    blocks: list[Any] = [wr.MarkdownBlock(again), wr.H1("Lineage"), wr.MarkdownBlock(lineage(chain))]
    for experiment in _experiments(chain):
        members = [run for run in chain["runs"] if run["experiment"] == experiment]
        stage = members[0]["stage"]
        blocks += [
            wr.H1(f"{experiment} (stage {stage})"),
            wr.PanelGrid(
                runsets=[runs(experiment)],
                panels=_laid([_line("loss", ["train/loss"]), *(_line(*row) for row in TRAINING)]),
            ),
        ]
        if stage == "moe":
            blocks += [
                wr.H2("Router balance"),
                wr.PanelGrid(runsets=[runs(experiment)], panels=_laid([_line(*row) for row in ROUTER])),
            ]
    every = [runs(experiment) for experiment in _experiments(chain)]
    blocks += [wr.H1("Where the time went"), wr.PanelGrid(runsets=every, panels=_laid(_goodput()))]
    blocks += [
        wr.H1("Held-out answers"),
        wr.PanelGrid(runsets=every[-1:], panels=[_table("held_out/answers")]),
    ]
    made = wr.Report(
        entity=chain["entity"],
        project=chain["project"],
        title=f"{chain['experiment']}: from stage to stage",
        description=", ".join(_experiments(chain)),
        blocks=blocks,
    )
    return made._to_model()


def lineage(chain: dict[str, Any]) -> str:
    """Which run started from which checkpoint, with links to the artifacts' lineage, as Markdown."""
    base = f"/{chain['entity']}/{chain['project']}"
    lines = ["| stage | run | leaves | starts from |", "|---|---|---|---|"]
    for run in chain["runs"]:
        left, above = "-", "the backbone's weights" if not run["parent"] else "-"
        if run["digest"]:
            place = f"{base}/artifacts/model/{safe('checkpoint-' + run['id'])}/h-{run['digest'][:12]}/lineage"
            left = f"[step {run['step']}, {run['digest'][:12]}]({place})"
        if run["from"]:
            above = run["from"][:12]
        lines.append(
            f"| {run['stage']} | [{run['name']}]({base}/runs/{safe(run['id'], 64)}) | {left} | {above} |"
        )
    return "\n".join(lines)


def _experiments(chain: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(run["experiment"] for run in chain["runs"]))


def _line(title: str, names: Sequence[str]) -> Any:
    import wandb_workspaces.reports.v2 as wr

    return wr.LinePlot(title=title, x=STEP, y=list(names))


def _goodput() -> list[Any]:
    import wandb_workspaces.reports.v2 as wr

    share = wr.ScalarChart(title="share of the time in steps that are kept", metric="goodput/share")
    return [wr.BarPlot(title="seconds by what they went into", metrics=SPENT, orientation="h"), share]


def _table(name: str) -> Any:
    import wandb_workspaces.reports.v2 as wr

    return wr.WeavePanelSummaryTable(table_name=name)


def _markdown(text: str) -> Any:
    import wandb_workspaces.reports.v2 as wr

    return wr.MarkdownPanel(markdown=text)


def _laid(panels: list[Any]) -> list[Any]:
    """Three in a row."""
    import wandb_workspaces.reports.v2 as wr

    for n, panel in enumerate(panels):
        panel.layout = wr.Layout(x=n % 3 * 8, y=n // 3 * 6, w=8, h=6)
    return panels


def save(chain: dict[str, Any]) -> dict[str, str]:
    """Make or update both; their addresses."""
    import wandb
    from wandb_workspaces._graphql import execute_graphql, get_app_url

    api = wandb.Api(timeout=60)
    chain = {**chain, "entity": chain["entity"] or os.environ.get("WANDB_ENTITY") or api.default_entity}
    slug = sha256(chain["experiment"].encode()).hexdigest()[:11]
    where = {"entity": chain["entity"], "project": chain["project"]}

    def put(kind: str, name: str, model: Any) -> str:
        found = execute_graphql(api, FIND, {**where, "kind": kind, "name": name})["project"]
        if found is None:
            raise PanelsError(
                f"W&B has no project {chain['entity']}/{chain['project']} yet: train a run online, or send one with "
                "`runs.py sync` first"
            )
        nodes = [edge["node"] for edge in found["allViews"]["edges"]]
        known = next((node["id"] for node in nodes if node["name"] == name), None)
        values = {**where, "id": known, "kind": kind, "name": name, "title": model.display_name}
        values |= {"description": getattr(model, "description", "") or ""}
        values |= {"spec": model.spec.model_dump_json(by_alias=True, exclude_none=True)}
        return str(execute_graphql(api, SAVE, values)["upsertView"]["view"]["id"])

    put("project-view", f"nw-{slug}-v", workspace(chain))
    page = report(chain)
    id = put("runs", f"report-{slug}", page)
    base = f"{get_app_url(api).rstrip('/')}/{chain['entity']}/{chain['project']}"
    title = safe(page.display_name).replace(".", "-")
    return {"workspace": f"{base}?nw={slug}", "report": f"{base}/reports/{title}--{id.rstrip('=')}"}


def main() -> None:
    from launch.online import session
    from launch.online.reach import account, reachable

    chain = json.loads(sys.stdin.read())
    try:
        url = session.base_url()
        if not account(url):
            raise PanelsError(f"no login for {url} here: run `wandb login`, or set WANDB_API_KEY")
        if not reachable(url):
            raise PanelsError(f"{url} does not answer: try again later")
        said: dict[str, str] = save(chain)
    except PanelsError as error:
        said = {"error": str(error)}
    except Exception as error:  # the client's own kinds are many
        said = {"error": f"W&B says: {(str(error).strip().splitlines() or [type(error).__name__])[0]}"}
    print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main()
