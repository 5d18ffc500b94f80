"""PEFT's layout of Arrow; see :class:`PeftArrowLayout`."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ..config import MixtureConfig
from ..errors import CheckpointError
from .by_module import PEFT_PREFIX
from .folder import ADAPTER_CONFIG, ADAPTER_TENSORS, Folder
from .layout import LAYOUTS, Architecture, Content, Layout, inspect, refuse
from .peft_arrow_parts import ITERATIONS, PROTOTYPES, ArrowOptions, PeftArrowStored, Subtracted, prototypes
from .peft_config import PeftConfig, read_config
from .peft_files import refuse_unwritable, write_adapter
from .peft_writing import WrittenAdapter
from .reading import parse, parse_known
from .tensor_file import JoinedFile, TensorFile
from .xlora_parts import Expert, backbone_of, experts_of, read_expert, union
from .xlora_places import adapter_files, find, missing
from .xlora_writing import alone

logger = logging.getLogger(__name__)

ROUTER = "arrow_router"
_KINDS = ("frozen", "lora", "rslora")


@LAYOUTS.register("peft_arrow")
class PeftArrowLayout(Layout):
    """Arrow as PEFT saves it (arXiv 2405.11157; huggingface/peft 0.21.2, tuners/lora/arrow.py), read and written.

    A folder with one folder for each adapter, as ``save_pretrained`` of a model of ``create_arrow_model`` writes it.
    Either it or its ``arrow_router`` may be given.

    ``arrow_router/``
        PEFT's pair of files (see layout peft) with arrow_config: top_k (3), router_temperature (1.0), rng_seed (null),
        use_gks (false), task_adapter_names ("task_0" and so on, in the order of the experts), gks_adapter_names
        ("gks_0" and so on). Its factors are placeholders: it routes, and adds nothing by itself.
    ``task_0/``, ``task_1/``, ...
        the task adapters, in layout peft: plain or rank-stabilised LoRA of the same linears and ranks.
    ``gks_0/``, ...
        with use_gks, the general adapters.

    To name adapters that lie elsewhere, put their folders where these names are looked for: in the folder of the
    checkpoint, beside it, or beside the folder that holds it. Nothing is downloaded because a file says so.

    Read as frozen experts under router arrow. Prototypes are not in the files: PEFT makes them anew in the first
    forward, by 15 steps of power iteration from a vector of rng_seed, and so does this reader, once, on the CPU; on a
    GPU PEFT draws other vectors from the same seed. Without rng_seed PEFT draws at random, and what it finds cannot be
    had again; then they are the exact singular vectors, which is what the iteration is after. With use_gks the mean
    factors of the general adapters are taken off each task adapter's, as PEFT does it (``peft_factors`` of
    :func:`~moelora.routers.arrow.gen_know_sub`). The router's lora_dropout is left out: nothing of this is trained.

    Quirks: PEFT subtracts in place. A model that was saved after its first forward has general knowledge taken off its
    task adapters already, and loading it takes it off again; the files do not tell, so save before, or set use_gks to
    false. PEFT cannot load the router's folder: it forgets task_adapter_names when it reads arrow_config, so that only
    ``create_arrow_model`` on the task adapters is left. It ignores magnitudes (DoRA) in Arrow; here such an adapter is
    refused.

    Written for mixtures whose prototypes are those that PEFT makes (method power, 15 steps), checked number by number.
    ``create_arrow_model`` on the task folders needs the same top_k, temperature and seed, and adapters at every linear
    of the backbone that has one of their names.
    """

    files = (ADAPTER_CONFIG, *ADAPTER_TENSORS, *(f"{ROUTER}/{name}" for name in (ADAPTER_CONFIG, *ADAPTER_TENSORS)))

    def detect(self, folder: Folder) -> str | None:
        router = _router(folder)
        return None if router is None else f"{router.path.name}/{ADAPTER_CONFIG} has arrow_config"

    def further_files(self, folder: Folder) -> tuple[str, ...]:
        router = _router(folder)
        assert router is not None
        _, options = _read_router(router)
        names = [*options.task_adapter_names, *options.general()]
        return adapter_files(place for name in names for place in _places(name))

    def read(self, folder: Folder) -> PeftArrowStored:
        router = _router(folder)
        assert router is not None
        config, options = _read_router(router)
        path = router.path / ADAPTER_CONFIG
        experts, general = (
            [_adapter(folder, router, key, name) for name in names]
            for key, names in {
                "task_adapter_names": options.task_adapter_names,
                "gks_adapter_names": options.general(),
            }.items()
        )
        if options.use_gks and not general:
            raise CheckpointError(f"{path}: gks_adapter_names: use_gks is true, expected at least one name, found none")
        _refuse_unlike(router, experts, general)
        if options.rng_seed is None:
            logger.warning(
                "%s: no rng_seed: prototypes are the exact singular vectors here; PEFT draws others in every run", path
            )
        file: TensorFile = JoinedFile(folder.path, {each.label: (f"{each.label}/", each.file) for each in experts})
        values = {**experts_of(experts), "dropout": 0.0, "expert_dropout": "shared"}
        site = {"target": union(experts), "experts": values, "router": options.router()}
        stored = PeftArrowStored(
            folder=folder.path,
            backbone=backbone_of(config.base_model_name_or_path, config.revision, experts),
            architecture=Architecture(),
            mixture=parse(MixtureConfig, {"sites": [site]}, path),
            file=Subtracted(file, [each.file for each in general]) if general else file,
            detail="less general knowledge" if general else "",
            experts=experts,
        )
        declared = stored.declared()
        problems, _ = inspect(stored.file, [part for each in stored.parts(declared).values() for part in each])
        refuse(stored.file.path, problems, stored.backbone.name)
        return stored

    def write(self, folder: Path, content: Content) -> None:
        refuse_unwritable("peft_arrow", _against(content))
        refuse_unwritable("peft_arrow", _other_prototypes(content))
        peft = LAYOUTS.create("peft")
        adapters = list(alone(content))
        names = [f"task_{index}" for index in range(len(adapters))]
        for name, adapter in zip(names, adapters, strict=True):
            (folder / name).mkdir()
            peft.write(folder / name, adapter)
        router = content.mixture.sites[0].router
        assert router is not None
        options = ArrowOptions(
            top_k=router.top_k,
            router_temperature=router.temperature,
            task_adapter_names=names,
            gks_adapter_names=[],
            rng_seed=router.seed,
        )
        placeholder = {name: torch.zeros_like(value) for name, value in adapters[0].tensors.items()}
        written = WrittenAdapter(replace(adapters[0], tensors=placeholder))
        (folder / ROUTER).mkdir()
        config = {**written.config(), "alpha_pattern": {}, "arrow_config": options.to_dict()}
        write_adapter(folder / ROUTER, config, written.tensors(), pickled=False)


def _router(folder: Folder) -> Folder | None:
    """The folder of the router: this one, or one in it."""
    inside = [folder] if folder.has(ADAPTER_CONFIG) else []
    if not inside and folder.has(f"{ROUTER}/{ADAPTER_CONFIG}"):
        inside = [folder.inner(ROUTER)]
    return next((each for each in inside if each.mapping(ADAPTER_CONFIG).get("arrow_config") is not None), None)


def _read_router(router: Folder) -> tuple[PeftConfig, ArrowOptions]:
    path = router.path / ADAPTER_CONFIG
    values = router.mapping(ADAPTER_CONFIG)
    options = values["arrow_config"]
    if not isinstance(options, dict):
        raise CheckpointError(f"{path}: arrow_config: expected a mapping, found {options!r}; the file was edited")
    return read_config({**values, "arrow_config": None}, path), parse_known(ArrowOptions, options, path)


def _places(name: str) -> list[str]:
    """Where the adapter of a name is looked for, seen from the checkpoint."""
    return [name, f"../{name}", f"../../{name}"]


def _adapter(folder: Folder, router: Folder, key: str, name: str) -> Expert:
    there = find(folder, _places(name))
    if there is None:
        raise missing(folder, str((router.path / ADAPTER_CONFIG).relative_to(folder.path)), key, name, _places(name))
    return read_expert(there[1], there[0])


def _refuse_unlike(router: Folder, experts: Sequence[Expert], general: Sequence[Expert]) -> None:
    """Refuse adapters that PEFT could not stack, and a router that was made for others.

    Raises:
        CheckpointError: linears or ranks differ.
    """
    first = experts[0]
    wanted = {path: (factor.rank, factor.widths) for path, factor in first.factors.items()}
    for other in (*experts[1:], *general):
        for path in dict.fromkeys([*wanted, *other.factors]):
            here, there = wanted.get(path), other.factors.get(path)
            if there is None or here != (there.rank, there.widths):
                shown = "nothing" if there is None else f"rank {there.rank}, {there.widths[0]} to {there.widths[1]}"
                raise CheckpointError(
                    f"{other.file.path}: {path}: expected what {first.label!r} has there, "
                    f"{'nothing' if here is None else f'rank {here[0]}, {here[1][0]} to {here[1][1]}'}, found {shown}: "
                    "Arrow stacks adapters of the same linears and ranks; take such adapters"
                )
    file = router.tensors(*ADAPTER_TENSORS)
    keys = {f"{PEFT_PREFIX}{path}.lora_{which}.weight" for path in wanted for which in "AB"}
    if keys != file.headers.keys():
        odd = sorted(keys ^ file.headers.keys())
        raise CheckpointError(
            f"{file.path}: {', '.join(odd[:5])}: the router's placeholders are not at the linears of its "
            f"{len(experts)} adapters ({first.label!r} and so on): these are not the adapters that it was made for"
        )


def _against(content: Content) -> Iterator[str]:
    """Reasons against the layout."""
    mixture, site = content.mixture, content.mixture.sites[0]
    if mixture.modules_to_save:
        yield "it has no modules that are saved whole"
    if len(mixture.sites) > 1:
        yield f"it has one configuration of experts for all linears, this mixture has {len(mixture.sites)}"
    if site.experts.kind not in _KINDS:
        yield f"its experts are {' or '.join(_KINDS)}, found {site.experts.kind}"
    if site.router is None or site.router.kind != "arrow":
        yield f"its router is arrow, found {'none' if site.router is None else site.router.kind}"
        return
    if site.router.mix != "outputs":
        yield f"it weighs what adapters add (mix: outputs), found mix: {site.router.mix}"
    if site.router.share != "module":
        yield f"each site has its own router, found share: {site.router.share}"
    for path in content.sites[0]:
        if f"{path}.lora_B" not in content.tensors:
            yield f"its sites are linears, {path!r} is an FFN block"
            return
        if len(ranks := set(site.experts.at(path).ranks)) > 1 or 0 in ranks:
            yield f"all experts of a site have one rank above 0, found {sorted(ranks)} at {path!r}"


def _other_prototypes(content: Content) -> Iterator[str]:
    """Where the prototypes are not those that PEFT will make."""
    site = content.mixture.sites[0]
    assert site.router is not None
    power = site.router.model_copy(update={"method": "power", "n_iter": ITERATIONS})
    for path in content.sites[0]:
        tensors = [content.tensors[f"{path}{name}"] for name in (".lora_A", ".lora_B", PROTOTYPES)]
        A, B, ours = (tensor.detach().float().cpu() for tensor in tensors)
        theirs = prototypes(power, A, B, site.experts.at(path).ranks)
        cosine = torch.cosine_similarity(ours, theirs, dim=1).abs().min().item()
        if cosine < 1 - 1e-6:
            yield (
                f"PEFT makes prototypes anew by {ITERATIONS} steps of power iteration from seed {power.seed}, those "
                f"of this mixture are others (cosine {cosine:.3f} at {path!r}): fit them with method power, n_iter "
                f"{ITERATIONS}, on the CPU"
            )
            return
