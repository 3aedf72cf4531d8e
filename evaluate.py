"""Judge explainers: ``python evaluate.py compare --config configs/busi/compare.yaml``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import cached_property, partial
from hashlib import sha256
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, TypeVar

import pandas as pd
import torch
import wandb
from jsonargparse import auto_cli
from lightning.fabric import Fabric
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import seed_everything
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms.v2.functional import to_pil_image

from classifiers import Classifier, Network, Optimisation, load_network
from classifiers.fitting import fit_by_heart
from classifiers.memory import keep_freed_memory
from classifiers.network import check_classes
from classifiers.randomise import groups, layers, owners, randomised, save_network
from datamodules import Relabelled
from datamodules.base import ImageDataModule, Split, collate, unpack
from datamodules.summary import content_of_module, sizes
from explainers import attribution
from explainers.base import Explainer
from explainers.batches import limit_memory
from explainers.command import plainly
from explainers.evaluation import agreement as groups_of
from explainers.evaluation import compare as scoring
from explainers.evaluation import pictures, published, report
from explainers.evaluation import quality as judged
from explainers.evaluation import repeatability as pairs
from explainers.evaluation import sanity as checks
from explainers.evaluation import thresholds as cuts
from explainers.evaluation.counterfactual import Real
from explainers.evaluation.explorer import Case, explorer, scores_of
from explainers.evaluation.finished import Finished, Maps
from explainers.evaluation.results import Results
from explainers.evaluation.statistics import Row
from explainers.evaluation.tables import long_table
from explainers.evaluation.thresholds import Sweep
from explainers.learned import LearnedExplainer, load_explainer
from explainers.tracking import artifact_names, declare_inputs, log_files, wandb_mode
from explainers.views import Views, smooth
from explainers.whole import write_whole

Method = Callable[[Network], Explainer]
T = TypeVar("T")
GALLERY = 8  # rows of pictures on a page; the explorer shows the others


def compare(
    data: ImageDataModule,
    classifier: str,
    explainers: dict[str, str] | None = None,
    methods: dict[str, Method] | None = None,
    views: Views | None = None,
    smoothing: tuple[float, ...] = (0.0, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1),
    split: Literal["val", "test"] = "test",
    limits: dict[str, scoring.Limit] | None = None,
    reference: str | None = None,
    out: str = "runs/compare",
    pictured: int = 8,
    seed: int = 0,
    devices: int = 1,
    accelerator: str = "auto",
    logging: Literal["off", "wandb"] = "off",
    memory_megabytes: int | None = None,
    ids: Literal["hashed", "own"] = "hashed",
) -> None:
    """Score explainers side by side; writes table.csv, table.md, scores.csv and report.html.

    Finished rows lie in ``out``/finished, maps that took more than a second in ``out``/maps: the
    same command goes on where it was interrupted.

    Args:
        data: Images with masks, as in training.
        classifier: Checkpoint of the classifier that is explained.
        explainers: Checkpoints of learned explainers, by the name of their row.
        methods: Other methods, by the name of their row.
        views: Geometric views, the same for every method; none scores plain maps alone.
        smoothing: Sigmas (share of the image side) from which each method's own is chosen by
            average precision on the validation split; (0) scores raw maps alone.
        split: Scored split.
        limits: Methods, by the name of their row, that are too slow for all images, and how many
            annotated ones they are scored on.
        reference: Method whose best row the others are held against, beside the best control's.
        out: Folder that everything is written to.
        pictured: Images in the page's explorer, the first annotated ones as a gallery too; methods
            that are limited to fewer are left out of both; 0 is none.
        seed: Of everything that draws.
        devices: Processes.
        accelerator: Where they run.
        logging: wandb keeps the tables and plots there too, offline without a key.
        memory_megabytes: Most memory of each process, or of its GPU, while methods work: their
            batches are halved until they fit; ``data.loading.batch_size`` must fit by itself.
        ids: Of images in what W&B gets; hashed leaves out the groups and columns of a table too.
    """
    if memory_megabytes is None:
        keep_freed_memory()
    seed_everything(seed, verbose=False)
    strategy = "ddp" if devices > 1 else "auto"
    fabric = Fabric(accelerator=accelerator, devices=devices, strategy=strategy)
    fabric.launch()
    with fabric.rank_zero_first():
        data.prepare_data()
    data.setup("test")
    network = load_network(classifier).to(fabric.device)
    check_classes(network.class_names, data.class_names)
    learned = {
        name: same_classifier(load_explainer(path).to(fabric.device), network, name)
        for name, path in (explainers or {}).items()
    }
    others = built(methods or {}, network)
    entries = [scoring.Entry(name, one) for name, one in (learned | others).items()]
    entries += controls(network, data, seed)
    if memory_megabytes is not None:
        limit_memory(memory_megabytes, fabric.device)
    protocol = scoring.Protocol(split, views, smoothing, checked_limits(limits or {}, entries))
    groups = {record.id: record.group for record in data.splits[split]}
    images = scoring.classified(network, data.loader(split), groups, fabric.device)
    content = [scoring.digest(data.loader("val")), scoring.digest(data.loader(split))]
    finished = Finished(Path(out) / "finished", content, views, smoothing)
    maps = Path(out) / "maps"
    scores, costs = score(entries, data, protocol, fabric.device, finished, maps)
    real = real_image(data, split)
    for name, explainer in learned.items():
        batches = data.loader(split)
        scores += scoring.score_generated(name, explainer, network, batches, fabric.device, real)
    if fabric.is_global_zero:
        per_image = pd.DataFrame(scores)
        per_image.insert(1, "group", per_image["id"].map(groups))
        results = Results(per_image, images, pd.DataFrame(costs))
        shown = results.write(Path(out), reference)
        sources = {"Classifier": classifier, **(explainers or {})}
        facts = {
            "Device": f"{fabric.device}, batches of {data.loading.batch_size}, seed {seed}",
            "Checkpoints": ", ".join(f"{name}: {path}" for name, path in sources.items()),
        }
        cases = pictured_images(entries, results, data, protocol, pictured, fabric.device, maps)
        write = partial(page_of, Path(out), results, shown, protocol, type(data).__name__, facts)
        write_whole(Path(out) / "report.html", write(cases))
        if logging == "wandb":
            told = cases if ids == "own" else [nameless(case) for case in cases]
            log_to_wandb(Path(out), shown, sources.values(), told, write(told))


def real_image(data: ImageDataModule, split: Split) -> Real:
    """What gives an image of a split by its id, None where there is none."""
    images = data.dataset(split)
    places = {record.id: place for place, record in enumerate(images.records)}

    def image(name: str) -> Tensor | None:
        return unpack(images.item(places[name])[1].image) if name in places else None

    return image


def nameless(case: Case) -> Case:
    """A case under a hash of its id, with nothing from the user's table."""
    name = sha256(case.name.encode()).hexdigest()[:12]
    ours = ("label", "decision", "correct")
    facts = {k: v for k, v in case.facts.items() if k in ours or k.startswith("p(")}
    return replace(case, name=name, facts=facts)


def page_of(
    out: Path,
    results: Results,
    shown: Mapping[str, pd.DataFrame],
    protocol: scoring.Protocol,
    data: str,
    facts: Mapping[str, str],
    cases: Sequence[Case],
) -> str:
    """The page report.html: protocol and other facts, tables, plots, explorer and pictures."""
    masked = results.scores.query("metric == 'average_precision'")["id"].nunique()
    known = {
        "Data": f"{data}, {protocol.split} split, {len(results.images)} images, {masked} with a "
        "mask",
        "Views": str(protocol.views) if protocol.views else "none",
        "Smoothing": f"chosen on the validation split from {list(protocol.smoothing)}",
    }
    plots = {path.stem: path.read_bytes() for path in sorted(out.glob("*.png"))}
    title, told = "Explainers compared", {**known, **facts}
    gallery = report.gallery_of(cases, GALLERY)
    return report.html_page(title, told, shown, gallery, plots, explorer(cases))


def log_to_wandb(
    out: Path,
    shown: Mapping[str, pd.DataFrame],
    sources: Iterable[str] = (),
    cases: Sequence[Case] = (),
    page: str = "",
) -> None:
    """Log a folder of results as a run of its own.

    Args:
        out: Folder; its tables and plots become an artifact.
        shown: Tables.
        sources: Checkpoints that the results are of: the run's lineage.
        cases: Images; the maps of the first are logged as a table.
        page: Becomes report.html of the artifact.
    """
    tables = {**shown, "Long form": pd.read_csv(out / "table.csv")}
    name = "/".join(out.parts[-2:])
    inputs = artifact_names(sources)
    left = [*sorted(out.glob("table.*")), *sorted(out.glob("*.png"))]
    with (
        TemporaryDirectory() as folder,
        wandb.init(project="simadv", name=name, dir=out, mode=wandb_mode()) as run,
    ):
        if page:
            left.append(Path(folder) / "report.html")
            left[-1].write_text(page, "utf-8")
        declare_inputs(run, inputs)
        run.log({key: wandb.Table(dataframe=table) for key, table in tables.items()})
        run.log({path.stem: wandb.Image(path) for path in sorted(out.glob("*.png"))})
        if cases:
            run.log({"Maps": map_table(cases[:GALLERY])})
        log_files(run, name, "report", left)


def map_table(cases: Sequence[Case]) -> wandb.Table:
    """A line for each image: what is known of it, the outlined image, the map of every method."""
    rows: list[Iterable[Any]] = []
    for case in cases:
        image = case.image[None]
        if case.mask is not None:
            image = pictures.outlined(image, case.mask[None])
        columns = [image, *(pictures.heat(one[None]) for one in case.maps.values())]
        known = case.facts["label"], case.facts["decision"]
        rows.append([case.name, *known, *(wandb.Image(to_pil_image(one[0])) for one in columns)])
    names: list[str | int] = ["id", "label", "decision", "image", *cases[0].maps]
    return wandb.Table(names, rows)


def pool(
    folders: list[str],
    out: str,
    reference: str | None = None,
    logging: Literal["off", "wandb"] = "off",
) -> None:
    """Pool comparisons of several seeds or folds.

    Of several seeds, which share their images, the mean per image is taken; folds, which share
    none, are put together. Intervals are over images.

    Args:
        folders: Out folders of compare, one per seed or fold, with the same methods.
        out: Folder that the pooled tables and scores are written to.
        reference: Method whose best row the others are held against.
        logging: As in compare.

    Raises:
        ValueError: If the folders share some of their images, but not all, or not all methods.
    """
    parts = [Results.read(Path(folder)) for folder in folders]
    methods = [set(part.scores["method"]) for part in parts]
    if uneven := set.union(*methods) - set.intersection(*methods):
        raise ValueError(
            f"folders must hold the same methods, but {sorted(uneven)} are not in all of "
            f"{folders}; compare them there, too, or leave them out of the others."
        )
    ids = [frozenset(part.images["id"]) for part in parts]
    seeds, folds = len(set(ids)) == 1, len(frozenset.union(*ids)) == sum(map(len, ids))
    if not seeds and not folds:
        raise ValueError(
            "folders must hold the same images (seeds) or none in common (folds), but of "
            f"{len(frozenset.union(*ids))} images some are in several of {folders}, not in all."
        )
    scores, images, costs = (
        pd.concat([part.assign(seed=k) if seeds else part for k, part in enumerate(kind)])
        for kind in zip(*((p.scores, p.images, p.costs) for p in parts), strict=True)
    )
    shown = Results(scores, images, costs).write(Path(out), reference)
    if logging == "wandb":
        log_to_wandb(Path(out), shown)


def paper(data: ImageDataModule, folder: str, split: Literal["val", "test"] = "test") -> None:
    """Write a comparison in the form of the paper's Tables III to XI: paper.md and paper.csv.

    Args:
        data: Images with masks that were compared: Table III is about them.
        folder: Out folder of compare or pool, which the two files are written to.
        split: Split that was compared.
    """
    results = Results.read(Path(folder))
    boxes = sizes(content_of_module(data, [split])).loc[[split]].droplevel(0)
    table = long_table(results.scores, results.images)
    cells = published.paper_cells(table, results.costs, boxes)
    cells.to_csv(Path(folder) / "paper.csv", index=False)
    (Path(folder) / "paper.md").write_text(published.paper_page(cells))


class Study:
    """A classifier, what explains it, and images: what the checks of sanity have in common.

    Args:
        data: Images with masks.
        classifier: Checkpoint of the trained classifier.
        methods: By the name of their row; random map and edge map are always there.
        explainers: Checkpoints of learned explainers, kept while the classifier changes.
        retrained: Checkpoints of learned explainers by the same names, trained for the changed
            classifier.
        views: Geometric views to average over; none by default.
        images: Annotated images, drawn by a hash of their ids; 0 takes all.
        split: Of the images.
        seed: Of everything that draws.
        accelerator: Where it runs.

    Raises:
        ValueError: If an explainer was trained for another classifier, or retrained names one that
            explainers does not.
    """

    def __init__(
        self,
        data: ImageDataModule,
        classifier: str,
        methods: dict[str, Method] | None = None,
        explainers: dict[str, str] | None = None,
        retrained: dict[str, str] | None = None,
        views: Views | None = None,
        images: int = 64,
        split: Literal["val", "test"] = "test",
        seed: int = 0,
        accelerator: str = "auto",
    ) -> None:
        keep_freed_memory()
        seed_everything(seed, verbose=False)
        data.prepare_data()
        data.setup("test")
        self.data, self.seed, self.views = data, seed, views
        self.accelerator = accelerator
        self.device = Fabric(accelerator=accelerator, devices=1).device
        self.network = load_network(classifier).to(self.device)
        check_classes(self.network.class_names, data.class_names)
        self.learned = self.loaded(explainers, self.network)
        self.retrained = retrained or {}
        if unknown := sorted(set(self.retrained) - set(self.learned)):
            raise ValueError(f"retrained names {unknown}, which explainers does not; name both.")
        self.methods: dict[str, Method] = {
            **(methods or {}),
            "Edge map": attribution.EdgeMap,
            checks.RANDOM: partial(attribution.RandomMap, seed=seed),
        }
        self.images, self.split = images, split
        self.groups = {r.id: r.group for records in data.splits.values() for r in records}

    @cached_property
    def batches(self) -> list[dict[str, Any]]:
        """The chosen images."""
        return self.annotated(self.split)

    @property
    def explainers(self) -> dict[str, Explainer]:
        """Every method of this classifier and the learned explainers, by name."""
        return built(self.methods, self.network) | self.learned

    def annotated(self, split: Literal["val", "test"]) -> list[dict[str, Any]]:
        """The chosen images of a split that have a mask, in batches."""
        chosen = scoring.drawn(self.data.loader(split), self.images or None)
        return list(scoring.annotated(self.data.loader(split), self.device, chosen))

    def loaded(
        self, explainers: Mapping[str, str] | None, network: Network
    ) -> dict[str, LearnedExplainer]:
        """Learned explainers by name, each of this classifier."""
        return {
            name: same_classifier(load_explainer(path).to(self.device), network, name)
            for name, path in (explainers or {}).items()
        }

    def write(
        self,
        states: Callable[[], Iterable[checks.State]],
        other: Network,
        out: Path,
        name: str,
        across: str,
    ) -> None:
        """Score every method at every state and the retrained explainers; write all files.

        Args:
            states: Gives the classifier as it is, then the changed ones.
            other: The changed classifier that the retrained explainers belong to.
            out: Folder.
            name: Of the files.
            across: Label of the steps in the plots.
        """
        rows: scoring.Rows = []
        kept: dict[str, Method] = {k: partial(with_network, own) for k, own in self.learned.items()}
        subjects = self.methods | kept
        for label, build in each(subjects, "Explaining"):
            with scoring.named(label):
                rows += checks.score_states(
                    label, build, states(), self.batches, self.views, keeps_target=label not in kept
                )
        pair = two_states("retrained", self.network, other)
        for label, explainer in self.loaded(self.retrained, other).items():
            by_network = {self.network: self.learned[label], other: explainer}
            rows += checks.score_states(
                label, by_network.__getitem__, pair, self.batches, self.views, keeps_target=False
            )
        checks.write(self.with_groups(rows), self.learned, out, name, across)

    def with_groups(self, rows: scoring.Rows) -> pd.DataFrame:
        """Scores as a table that has the group of each image."""
        scores = pd.DataFrame(rows)
        scores.insert(1, "group", scores["id"].map(self.groups))
        return scores

    def ids(self) -> list[str]:
        """Of the images, in their order."""
        return [name for batch in self.batches for name in batch["id"]]

    def maps(self, explainers: Mapping[pairs.Training, Explainer]) -> dict[pairs.Training, Tensor]:
        """Maps of all images by every explainer: of the labelled class, or the decided one."""
        return {
            training: torch.cat(
                [
                    explainer.explain(
                        batch["image"],
                        None if isinstance(explainer, LearnedExplainer) else batch["label"],
                        self.views,
                    )
                    for batch in self.batches
                ]
            )
            for training, explainer in explainers.items()
        }


def sanity(
    out: str = "runs/sanity",
    order: Literal["cascading", "independent"] = "cascading",
    steps: int = 10,
    **study: Any,
) -> None:
    """Draw the classifier's layers anew, from the output down, and see which maps change.

    Writes sanity_scores.csv (per image), sanity.csv (means, intervals), sanity.md with a verdict
    per method, and plots. Explainers are trained anew (retrained) for what randomise writes.

    Args:
        out: Folder that everything is written to.
        order: cascading draws one more group of layers anew at each step, independent each alone.
        steps: Groups that the layers are joined into; 0 takes each layer alone.
        **study: See Study.
    """
    subject = Study(**study)
    names = layers(subject.network, subject.batches[0]["image"][:1])
    parts = groups(names, steps)
    every = randomised(subject.network, names, subject.seed)

    def states() -> Iterator[checks.State]:
        yield checks.State(order, 0, "", subject.network)
        for step, part in enumerate(parts, 1):
            drawn = parts[:step] if order == "cascading" else [part]
            network = randomised(subject.network, chain(*drawn), subject.seed)
            yield checks.State(order, step, " ".join(part), network)

    subject.write(states, every, Path(out), "sanity", "groups of layers drawn anew, output first")


def randomise(classifier: str, out: str, seed: int = 0) -> None:
    """Write a checkpoint of the classifier with every layer drawn anew, to train explainers for.

    Args:
        classifier: Checkpoint of the trained classifier.
        out: File to write.
        seed: Of the draw: the one of sanity.
    """
    network = load_network(classifier)
    save_network(randomised(network, owners(network), seed), Path(out))


def label_randomisation(
    out: str = "runs/label_randomisation",
    share: float = 1.0,
    accuracy: float = 0.95,
    max_epochs: int = 100,
    optimisation: Optimisation | None = None,
    **study: Any,
) -> None:
    """Train the classifier on shuffled labels until it fits them, and see which maps change.

    Writes classifier.ckpt, which is taken up again where it is there, and files as sanity does.

    Args:
        out: Folder that everything is written to.
        share: Of the training labels that are shuffled among each other.
        accuracy: On the shuffled labels, at which training stops.
        max_epochs: At which it stops in any case.
        optimisation: Of the training; Adam at a constant rate of 1e-3 by default.
        **study: See Study.
    """
    subject = Study(**study)
    path = Path(out) / "classifier.ckpt"
    if not path.exists():
        module = Classifier(
            Network(**subject.network.recipe), optimisation or Optimisation(1e-3, "constant")
        )
        shuffled = Relabelled(subject.data, share, subject.seed)
        loaders = shuffled.train_dataloader(), shuffled.loader("train")
        fit_by_heart(module, *loaders, accuracy, max_epochs, Path(out), subject.accelerator)
        save_network(module.network, path)
    relabelled = load_network(path).to(subject.device)
    states = two_states("labels", subject.network, relabelled)
    name, across = "label_randomisation", "0: true labels, 1: shuffled labels"
    subject.write(lambda: states, relabelled, Path(out), name, across)


def repeatability(
    classifiers: dict[str, list[str]],
    explainers: dict[str, dict[str, list[str]]] | None = None,
    out: str = "runs/repeatability",
    **study: Any,
) -> None:
    """Compare the maps of several trainings, of one architecture or of several.

    Writes repeatability_scores.csv (per image and pair), repeatability.csv, repeatability.md and
    a matrix for every method. The labelled class is explained, by learned explainers the decided.

    Args:
        classifiers: Checkpoints of the classifiers, by the name of their architecture.
        explainers: By the name of their row, checkpoints by the name of the architecture.
        out: Folder that everything is written to.
        **study: See Study.
    """
    first = next(iter(classifiers.values()))[0]
    subject = Study(classifier=first, explainers=None, retrained=None, **study)
    trainings: dict[pairs.Training, Network] = {}
    for name, paths in classifiers.items():
        for k, path in enumerate(paths):
            network = load_network(path).to(subject.device)
            check_classes(network.class_names, subject.data.class_names)
            trainings[pairs.Training(name, k)] = network
    rows: scoring.Rows = []
    for label, build in each(subject.methods, "Explaining"):
        with scoring.named(label):
            maps = subject.maps({key: build(network) for key, network in trainings.items()})
        rows += pairs.pair_scores(label, maps, subject.ids())
    for label, by_architecture in (explainers or {}).items():
        learned = {
            pairs.Training(name, k): load_explainer(path).to(subject.device)
            for name, paths in by_architecture.items()
            for k, path in enumerate(paths)
        }
        rows += pairs.pair_scores(label, subject.maps(learned), subject.ids())
    pairs.write(subject.with_groups(rows), Path(out))


def quality(out: str = "runs/quality", smoothing: float = 0.0, **study: Any) -> None:
    """Score every method's maps by every metric of location and of faithfulness.

    Writes quality_scores.csv (per image), quality.csv (means, intervals) and quality.md. The class
    that the classifier decides is explained.

    Args:
        out: Folder that everything is written to.
        smoothing: Sigma of a Gaussian over the maps, share of the image side; 0 is off.
        **study: See Study; retrained has no use here.
    """
    subject = Study(**study)
    rows: scoring.Rows = []
    pixels = []
    for name, explainer in each(subject.explainers, "Scoring"):
        maps = []
        for batch in subject.batches:
            image = batch["image"]
            with scoring.named(name):
                maps.append(explainer.explain(image, views=subject.views, smoothing=smoothing))
            scores = judged.location_scores(maps[-1], batch)
            scores |= judged.faithfulness_scores(maps[-1], batch, subject.network)
            rows += scoring.long_form(batch["id"], scores, {"method": name})
        pixels.append(judged.pixels_of_all(name, maps, subject.batches))
    judged.write(subject.with_groups(rows), pd.concat(pixels), Path(out))


def thresholds(
    out: str = "runs/thresholds",
    metric: Literal["jaccard", "dice"] = "jaccard",
    sweep: Sweep | None = None,
    smoothing: float = 0.0,
    **study: Any,
) -> None:
    """Cut every method's maps at many thresholds; choose on validation, judge on the split.

    Writes thresholds_scores.csv (per image), thresholds.csv, best_thresholds.csv,
    thresholds_by_class.csv, thresholds.md and plots.

    Args:
        out: Folder that everything is written to.
        metric: By which the best threshold is chosen, for each kind of evidence and their union.
        sweep: Scalings and thresholds.
        smoothing: Sigma of a Gaussian over the maps, share of the image side; 0 is off.
        **study: See Study; retrained has no use here.
    """
    subject = Study(**study)
    batches = {"val": subject.annotated("val"), subject.split: subject.batches}
    rows: scoring.Rows = []
    for name, explainer in each(subject.explainers, "Explaining"):
        for split, parts in batches.items():
            with scoring.named(name):
                maps = [
                    explainer.explain(b["image"], views=subject.views, smoothing=smoothing)
                    for b in parts
                ]
            image, mask, features = (
                torch.cat([b[key] for b in parts]) for key in ("image", "mask", "features")
            )
            masks = dict(zip(subject.data.feature_names, features.unbind(1), strict=True))
            rows += (sweep or Sweep()).scores(
                {"method": name, "split": split},
                [i for b in parts for i in b["id"]],
                torch.cat(maps),
                image,
                {**masks, cuts.UNION: mask},
            )
    every = [b for parts in batches.values() for b in parts]
    labels = {i: int(k) for b in every for i, k in zip(b["id"], b["label"], strict=True)}
    decided = {
        i: int(k)
        for b in every
        for i, k in zip(b["id"], subject.network.decide(b["image"]), strict=True)
    }
    scores = subject.with_groups(rows)
    scores["label"] = scores["id"].map(labels).map(dict(enumerate(subject.data.class_names)))
    scores["correct"] = scores["id"].map(labels) == scores["id"].map(decided)
    cuts.write(scores, metric, Path(out))


def agreement(
    folder: str,
    columns: list[str],
    method: str,
    metric: str = "average_precision",
    averaged: Literal["plain", "views"] = "plain",
    smoothing: Literal["raw", "smoothed"] = "raw",
    out: str = "runs/agreement",
    pictured: int = 6,
    case: str | None = None,
    **study: Any,
) -> None:
    """Break the scores of a comparison down by groups of images; show the extremes of one row.

    Writes agreement.csv and agreement.html, with the images of the highest and lowest score; with
    case also agreement_cases.csv, in which each case counts once.

    Args:
        folder: Out folder of compare or pool.
        columns: To group by: label, decision, correct, confidence (of the decision, in quarters),
            or any column of the table (numbers in quarters).
        method: Whose images are shown, by the name of its row.
        metric: Score.
        averaged: Form of the row that is shown.
        smoothing: Form of the row that is shown.
        out: Folder that everything is written to.
        pictured: Images at each end.
        case: Column that names the case of an image, of which there may be several.
        **study: See Study; images and retrained have no use here.
    """
    subject = Study(**study)
    results = Results.read(Path(folder))
    tables = {"agreement": groups_of.by_group(results.scores, results.images, columns, metric)}
    if case:
        cases = groups_of.per_case(results.scores, results.images, case)
        tables["agreement_cases"] = groups_of.by_group(*cases, columns, metric)
    Path(out).mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        table.to_csv(Path(out) / f"{name}.csv", index=False)
    row = Row(method, averaged, smoothing)
    ends = groups_of.extremes(results.scores, row, metric, pictured)
    if not ends:
        raise ValueError(f"row {tuple(row)} has no {metric!r} in {folder!r}.")
    if method not in (explainers := subject.explainers):
        raise ValueError(f"method {method!r} is none of {sorted(explainers)}.")
    sigma = results.costs.set_index(["method", "views"])["sigma"].groupby(level=[0, 1]).mean()
    width = sigma[method, averaged] if smoothing == "smoothed" else 0.0
    views = subject.views if averaged == "views" else None
    loader = subject.data.loader(subject.split)
    shown: dict[str, list[report.Picture]] = {}
    for batch in scoring.annotated(loader, subject.device, ends):
        heat = explainers[method].explain(batch["image"], views=views, smoothing=width)
        columns_of = {
            "image": pictures.outlined(pictures.rgb(batch["image"]), batch["mask"]),
            method: pictures.heat(heat),
        }
        for k, name in enumerate(batch["id"]):
            shown[name] = [report.Picture(label, part[k]) for label, part in columns_of.items()]
    note = (
        "Intervals of the means hold one by one; those of the differences (a group against all "
        "other images) hold together: each leaves out 5 % / m of its row's m differences."
    )
    facts = {"Score": metric, "Shown": ", ".join(row), "Intervals": note}
    captioned = {f"{name}: {value:.3f}": shown.get(name, []) for name, value in ends.items()}
    titles = {"agreement": "Images by group", "agreement_cases": "Cases by group"}
    shown_tables = {titles[name]: table.round(3) for name, table in tables.items()}
    page = report.html_page("Agreement by group", facts, shown_tables, captioned)
    write_whole(Path(out) / "agreement.html", page)


def built(methods: Mapping[str, Method], network: Network) -> dict[str, Explainer]:
    """Every method of a classifier; what is wrong with one is told with its name."""
    explainers = {}
    for name, build in methods.items():
        with scoring.named(name):
            explainers[name] = build(network)
    return explainers


def two_states(order: checks.Order, network: Network, other: Network) -> list[checks.State]:
    """The classifier as it is, then another in its place."""
    return [checks.State(order, 0, "", network), checks.State(order, 1, "all", other)]


def with_network(explainer: LearnedExplainer, network: Network) -> LearnedExplainer:
    """A copy of a learned explainer that is asked about another classifier."""
    copied = deepcopy(explainer)
    copied.network = network
    return copied


def same_classifier(explainer: LearnedExplainer, network: Network, name: str) -> LearnedExplainer:
    """The explainer, or a ValueError where it explains another classifier."""
    own, other = explainer.network.state_dict(), network.state_dict()
    same = own.keys() == other.keys() and all(own[k].equal(other[k]) for k in own)
    if not same or explainer.network.threshold != network.threshold:
        raise ValueError(
            f"explainer {name!r} was trained for another classifier (its weights or threshold "
            "differ); give its own classifier, or train it again."
        )
    return explainer


def checked_limits(
    limits: dict[str, scoring.Limit], entries: Sequence[scoring.Entry]
) -> dict[str, scoring.Limit]:
    """The limits, or a ValueError where one is for a method that is not compared."""
    unknown = sorted(set(limits) - {entry.name for entry in entries})
    if unknown:
        raise ValueError(f"limits name {unknown}, which are none of the compared methods.")
    return limits


def controls(network: Network, data: ImageDataModule, seed: int) -> list[scoring.Entry]:
    """The four controls that every table holds."""
    training = DataLoader(data.dataset("train"), data.loading.batch_size, collate_fn=collate)
    mask = attribution.mean_mask(training).to(network.mean.device)
    rows: dict[str, Explainer] = {
        "Random map": attribution.RandomMap(network, seed),
        "Centred Gaussian": attribution.CentredGaussian(network),
        "Mean training mask": attribution.MeanMask(network, mask),
        "Edge map": attribution.EdgeMap(network),
    }
    return [scoring.Entry(name, explainer, True) for name, explainer in rows.items()]


def score(
    entries: Sequence[scoring.Entry],
    data: ImageDataModule,
    protocol: scoring.Protocol,
    device: torch.device,
    finished: Finished,
    maps: Path,
) -> tuple[scoring.Rows, scoring.Rows]:
    """Scores per image, and per method and views the chosen smoothing and the costs.

    Args:
        entries: Rows of the table.
        data: Images.
        protocol: Of all rows.
        device: Of the explainers.
        finished: Rows that are there.
        maps: Folder of maps that are slow to compute.
    """
    scores: scoring.Rows = []
    costs: scoring.Rows = []
    jobs = [(entry, variant) for entry in entries for variant in protocol.variants()]
    loaders = data.loader("val"), data.loader(protocol.split)
    with progress_bar() as progress:
        task = progress.add_task("", total=len(jobs))
        for entry, variant in jobs:
            form: Literal["plain", "views"] = "views" if variant else "plain"
            progress.update(task, description=f"{entry.name}, {form}")
            counts = protocol.choosing(entry.name, variant), protocol.limit(entry.name, variant)
            path = finished.path(entry.explainer, entry.name, entry.control, form, *counts)
            known = finished.read(path)
            if known is None:
                validation, scored = (
                    counted(
                        scoring.annotated(loader, device, scoring.drawn(loader, count)),
                        partial(progress.update, task),
                        f"{entry.name}, {form}",
                    )
                    for loader, count in zip(loaders, counts, strict=True)
                )
                explained = Maps(maps, entry.explainer, variant)
                known = scoring.score_entry(
                    entry, form, explained, validation, scored, protocol.smoothing
                )
                if path:
                    rank_zero_only(finished.write)(path, known)
            rows, row = known
            scores += rows
            costs.append(row)
            line = f"{entry.name}, {form}: sigma {row['sigma']:g}, {row['seconds']:.4f} s an image"
            rank_zero_only(progress.console.print)(line)  # stays in a log, where no bar is drawn
            progress.advance(task)
    return scores, costs


def counted(
    batches: Iterable[dict[str, Any]], tell: Callable[..., None], row: str
) -> Iterator[dict[str, Any]]:
    """The batches, the number of images that are done told beside the row's name."""
    done = 0
    for batch in batches:
        tell(description=f"{row}, {done} images done")
        yield batch
        done += len(batch["id"])


def pictured_images(
    entries: Sequence[scoring.Entry],
    results: Results,
    data: ImageDataModule,
    protocol: scoring.Protocol,
    count: int,
    device: torch.device,
    maps: Path,
) -> list[Case]:
    """The first images with the smoothed map of every method, controls left out.

    Methods with a limit are too slow for views here, and left out where it is below the count.
    """
    sigma = results.costs.set_index(["method", "views"])["sigma"]
    known = results.images.set_index("id")
    scores = dict(list(results.scores.groupby("id")))
    limits = {entry.name: protocol.limit(entry.name, None) for entry in entries}
    shown = [
        entry for entry in entries if not entry.control and (limits[entry.name] or count) >= count
    ]
    averaged = bool(protocol.variants()[-1])
    forms = {
        entry.name: "views" if averaged and entry.name not in protocol.limits else "plain"
        for entry in shown
    }
    explained = {
        entry.name: Maps(maps, entry.explainer, protocol.views if form == "views" else None)
        for entry, form in zip(shown, forms.values(), strict=True)
    }
    cost = scoring.Cost()
    cases: list[Case] = []
    for batch in data.loader(protocol.split):
        if len(cases) >= count:
            break
        image = batch["image"][: count - len(cases)].to(device)
        drawn = {
            name: smooth(maps_of(image, cost), sigma[name, forms[name]]).float().cpu()
            for name, maps_of in explained.items()
        }
        with torch.inference_mode():
            generated = {
                entry.name: [*map(pictures.rgb, entry.explainer.eval()(image))]
                for entry in shown
                if isinstance(entry.explainer, LearnedExplainer)
            }
        for k, name in enumerate(batch["id"][: len(image)]):
            cases.append(
                Case(
                    name,
                    facts_of(known.loc[name]),
                    pictures.rgb(image)[k],
                    batch["mask"][k] if batch["has_mask"][k] else None,
                    {method: one[k] for method, one in drawn.items()},
                    {method: (pair[0][k], pair[1][k]) for method, pair in generated.items()},
                    scores_of(scores.get(name, results.scores[:0]), forms),
                )
            )
    return cases


def facts_of(line: Mapping[Any, Any]) -> dict[str, str]:
    """What is known of an image as text; numbers have three decimals, empty values are left out."""
    texts = {k: f"{v:.3f}" if isinstance(v, float) else str(v) for k, v in line.items()}
    return {str(name): text for name, text in texts.items() if text not in ("", "nan")}


def progress_bar() -> Progress:
    """Bar with the current row, how many are done and the time left."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    return Progress(*columns, TimeRemainingColumn(), disable=getattr(rank_zero_only, "rank", 0) > 0)


def each(methods: Mapping[str, T], task: str) -> Iterator[tuple[str, T]]:
    """Names and methods under a bar, a line for each that is done."""
    with progress_bar() as progress:
        for number, (name, method) in enumerate(progress.track(methods.items(), description=task)):
            yield name, method
            progress.console.print(f"{task}: {name}, {number + 1} of {len(methods)} done")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    commands: list[Callable[..., object]] = [compare, pool, paper, sanity, randomise]
    commands += [label_randomisation, repeatability, thresholds, agreement, quality]
    auto_cli(commands, args=arguments, as_positional=False)


if __name__ == "__main__":
    with plainly():
        main()
