"""The parts of the host, put together from settings: for the daemon and for the command line."""

from __future__ import annotations

import logging
from threading import Event

from msgspec import Struct

from protocol.errors import Misconfigured
from trainer_host import keys
from trainer_host.custody import open_repository
from trainer_host.database import Database
from trainer_host.progress import ProgressFile
from trainer_host.publisher import Jobs, Publisher
from trainer_host.recipes.table import RECIPES
from trainer_host.registry import Registry
from trainer_host.repository import Repository
from trainer_host.settings import Settings
from trainer_host.store import Store
from trainer_host.trainer import Trainer

log = logging.getLogger(__name__)


class Parts(Struct, frozen=True, kw_only=True):
    """What works together on one state folder.

    Attributes:
        can_release: Whether enough of the keys that sign releases are here; else a release waits for signatures.
    """

    settings: Settings
    database: Database
    store: Store
    registry: Registry
    repository: Repository
    publisher: Publisher
    trainer: Trainer
    can_release: bool


def assemble(settings: Settings, stop: Event | None = None) -> Parts:
    """Open the database and the repository, load the keys, and end what a command that was killed had begun.

    Without the targets key the host stores, serves chunks and keeps the metadata fresh, and releases nothing by
    itself.

    Raises:
        Misconfigured: There are no keys or no repository yet, or something cannot be opened.
        Unavailable: The database does not answer, or the disk failed.
    """
    repository = open_repository(settings)
    if not repository.exists:
        raise Misconfigured(f"no repository in {settings.repository_dir}. Make one first: trainer-host keys init")
    for role in keys.ONLINE_ROLES:
        if not repository.can_sign(role):
            raise Misconfigured(f"{settings.keys_dir} has too few {role} keys. See: trainer-host keys verify")
    can_release = _can_release(repository)
    database = Database(settings.database)
    store, registry = Store(database), Registry(database)
    repository.copy_root(settings.root_file)
    registry.signed(repository.releases())
    report, jobs = ProgressFile(settings.progress_file), Jobs(settings.jobs_dir, settings.training.kept_jobs)
    recipes = {recipe.slot: recipe for recipe in map(settings.recipe, RECIPES)}
    publisher = Publisher(repository, registry, settings.gate, jobs, recipes, report=report, stop=stop)
    return Parts(
        settings=settings,
        database=database,
        store=store,
        registry=registry,
        repository=repository,
        publisher=publisher,
        trainer=Trainer(store, publisher, jobs, settings.training, report=report, stop=stop),
        can_release=can_release,
    )


def _can_release(repository: Repository) -> bool:
    try:
        if repository.can_sign("targets"):
            return True
    except Misconfigured as error:
        log.warning("cannot release models here: %s", error)
    else:
        log.warning("cannot release models here: the targets keys that are here are not enough")
    return False
