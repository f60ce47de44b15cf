"""PruneTrain as a callback of the real Lightning Trainer."""

import gc

import pytest
import torch
import torch.nn.functional as F

import ptsim
from ptsim.errors import UsageError
from tests.training.nets import small

pl = pytest.importorskip("lightning.pytorch")
from ptsim.integrations.lightning import PruneTrainCallback  # noqa: E402 - only where Lightning is

IMAGE = (3, 8, 8)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:the network has collapsed:UserWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),  # advice on workers and loggers
    pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning"),  # Lightning's
]


class Module(pl.LightningModule):
    """A user's module: its loss and its metrics are its own."""

    def __init__(self, *, killed_in_epoch=None, rate=0.05):
        super().__init__()
        torch.manual_seed(0)
        self.model = small(10)
        self.killed_in_epoch, self.rate = killed_in_epoch, rate

    def training_step(self, batch, index):
        if self.current_epoch == self.killed_in_epoch and index == 1:
            raise RuntimeError("killed")
        images, labels = batch
        return F.cross_entropy(self.model(images), labels)

    def validation_step(self, batch, index):
        images, labels = batch
        self.log("val_acc", (self.model(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.rate, momentum=0.9)


def loader():
    random = torch.Generator().manual_seed(0)
    patterns = torch.rand(10, *IMAGE, generator=random)
    labels = torch.randint(10, (64,), generator=random)
    images = patterns[labels] + 0.1 * torch.randn(64, *IMAGE, generator=random)
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=16)


def callback(folder, **more):
    options = {"penalty_ratio": 0.5, "interval": 2, "threshold": 0.12, "accuracy": "val_acc"} | more
    return PruneTrainCallback(input_shape=IMAGE, record=folder, **options)


def trainer(folder, callbacks, **more):
    options = {"max_epochs": 5, "accelerator": "cpu", "logger": False, "enable_progress_bar": False} | more
    return pl.Trainer(default_root_dir=folder, callbacks=callbacks, enable_model_summary=False, **options)


def test_it_prunes_and_records_as_a_loop_by_hand_does(tmp_path):
    module = Module()
    trainer(tmp_path, [callback(tmp_path / "run")], gradient_clip_val=1.0, enable_checkpointing=False).fit(
        module, loader(), loader()
    )
    by_hand = Module().model
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.05, momentum=0.9)
    pruner = ptsim.PruneTrain(
        by_hand, optimizer, input_shape=IMAGE, penalty_ratio=0.5, interval=2, threshold=0.12, record=tmp_path / "hand"
    )
    for _ in range(5):
        for images, labels in loader():
            loss = F.cross_entropy(by_hand(images), labels)
            optimizer.zero_grad()
            loss.backward()
            pruner.step(loss)
            torch.nn.utils.clip_grad_norm_(by_hand.parameters(), 1.0)
            optimizer.step()
        with torch.no_grad():
            hits = [(by_hand.eval()(images).argmax(1) == labels).float().mean() for images, labels in loader()]
        by_hand.train()
        pruner.end_epoch(float(torch.stack(hits).mean()))
    pruner.close()
    for (name, ours), theirs in zip(module.model.named_parameters(), by_hand.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    trace, hand = (ptsim.read_trace(tmp_path / name) for name in ("run", "hand"))
    assert trace.complete
    assert len(trace.networks) > 1
    for ours, theirs in zip(trace.epochs, hand.epochs, strict=True):
        assert ours.train_loss == pytest.approx(theirs.train_loss, rel=1e-6)
        assert ours.validation_accuracy == pytest.approx(theirs.validation_accuracy)
        assert (ours.num_images, ours.num_iterations, ours.batch_per_gpu) == (64, 4, 16)
        assert ours.architecture == theirs.architecture
        assert ours.time.forward_s > 0
        assert (
            ours.time.optimizer_s < ours.time.wall_s / 2
        )  # the step's closure is forward and backward, not the update
    assert len(ptsim.simulate(tmp_path / "run", "dgx-a100", gpus=[1, 8])) == 2


def test_a_killed_run_goes_on_from_its_checkpoint_to_the_same_network(tmp_path):
    whole = Module()
    trainer(tmp_path / "a", [callback(tmp_path / "whole")]).fit(whole, loader(), loader())
    with pytest.raises(RuntimeError, match="killed"):
        trainer(tmp_path / "b", [callback(tmp_path / "run")]).fit(Module(killed_in_epoch=3), loader(), loader())
    assert ptsim.read_trace(tmp_path / "run").end.status == "failed"
    gc.collect()
    checkpoint = next((tmp_path / "b").rglob("*.ckpt"))
    again = Module()
    trainer(tmp_path / "b", [callback(tmp_path / "run")]).fit(again, loader(), loader(), ckpt_path=checkpoint)
    for (name, ours), theirs in zip(again.model.named_parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    trace = ptsim.read_trace(tmp_path / "run")
    assert trace.complete
    assert [e.architecture for e in trace.epochs] == [
        e.architecture for e in ptsim.read_trace(tmp_path / "whole").epochs
    ]
    loaded = torch.load(checkpoint, weights_only=True)
    elsewhere = Module()
    callback(None).restore(elsewhere, loaded)
    elsewhere.load_state_dict(loaded["state_dict"])


def test_a_fit_that_fails_leaves_nothing_on_the_module_and_another_one_may_follow(tmp_path):
    module = Module(killed_in_epoch=1)
    fitting = trainer(tmp_path, [callback(tmp_path / "failed")], enable_checkpointing=False)
    with pytest.raises(RuntimeError, match="killed"):
        fitting.fit(module, loader(), loader())
    assert "on_load_checkpoint" not in vars(module)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
    optimizer = fitting.optimizers[0]
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    end = ptsim.read_trace(tmp_path / "failed").end
    assert (end.status, end.reason, end.epochs) == ("failed", "killed", 1)
    module.killed_in_epoch = None
    trainer(tmp_path, [callback(tmp_path / "again")], max_epochs=2, enable_checkpointing=False).fit(module, loader())
    assert ptsim.read_trace(tmp_path / "again").complete


def test_a_pruned_checkpoint_is_tested_by_a_fresh_module_and_by_the_trained_one(tmp_path):
    class Tested(Module):
        test_step = Module.validation_step

    saved = pl.callbacks.ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1)
    trained = Tested()
    trainer(tmp_path, [callback(None), saved], max_epochs=4).fit(trained, loader(), loader())
    last = tmp_path / "epoch=3.ckpt"
    accuracies = [
        trainer(tmp_path, [callback(None)]).test(module, loader(), ckpt_path=last, verbose=False)[0]["val_acc"]
        for module in (Tested(), trained)
    ]
    assert accuracies[0] == accuracies[1]
    with pytest.raises(UsageError, match="the stored structure"):
        trainer(tmp_path, [callback(None)]).test(trained, loader(), ckpt_path=tmp_path / "epoch=0.ckpt")


def test_accumulated_gradients_are_one_iteration_with_the_mean_of_their_losses(tmp_path):
    module = Module(rate=0.0)
    trainer(tmp_path, [callback(tmp_path / "run")], accumulate_grad_batches=2, max_epochs=1).fit(module, loader())
    epoch = ptsim.read_trace(tmp_path / "run").epochs[0]
    assert (epoch.num_images, epoch.num_iterations) == (64, 2)
    fresh = Module().model
    losses = [F.cross_entropy(fresh(images), labels).item() for images, labels in loader()]
    assert epoch.train_loss == pytest.approx(sum(losses) / 4, rel=1e-6)
    # Eq. 3 with a ratio of one half: the penalty is as large as the first loss, which is that of the first two passes.
    assert epoch.penalty == pytest.approx(sum(losses[:2]) / 2, rel=1e-5)


@pytest.fixture
def torchs_own_group(monkeypatch):
    """Lightning leaves the process group and its variables to whoever comes next."""
    for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "")  # put back at the end
        monkeypatch.delenv(name)
    yield
    torch.distributed.destroy_process_group()


def test_data_parallel_is_wrapped_again(tmp_path, torchs_own_group):
    module = Module()
    ours = callback(tmp_path / "run")
    trainer(tmp_path, [ours], strategy="ddp", devices=1, max_epochs=4, enable_checkpointing=False).fit(
        module, loader(), loader()
    )
    trace = ptsim.read_trace(tmp_path / "run")
    assert len(trace.epochs) == 4
    assert len(trace.networks) > 1
    assert all(epoch.time.exposed_communication_s > 0 for epoch in trace.epochs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"network": "backbone"}, "this Module has no part 'backbone' that is a network; its parts: model"),
        ({"accuracy": "val_accuracy"}, "nothing was logged as 'val_accuracy' in this epoch; logged: val_acc"),
        ({"interval": 0}, "interval is 0, expected a positive number"),
    ],
)
def test_misuse_is_one_sentence(options, message, tmp_path):
    fitting = trainer(tmp_path, [callback(tmp_path / "run", **options)], max_epochs=1, enable_checkpointing=False)
    with pytest.raises(UsageError) as caught:
        fitting.fit(Module(), loader(), loader())
    assert caught.value.message == message


def test_a_checkpoint_without_the_callback_is_named(tmp_path):
    with pytest.raises(UsageError, match="written without PruneTrainCallback"):
        callback(None).restore(Module(), {"state_dict": {}})


def test_a_callback_that_keeps_an_unpruned_copy_is_named(tmp_path):
    others = [pl.callbacks.StochasticWeightAveraging(swa_lrs=0.01), callback(tmp_path / "run")]
    with pytest.raises(UsageError, match="StochasticWeightAveraging keeps a copy of the network"):
        trainer(tmp_path, others, max_epochs=2).fit(Module(), loader(), loader())
