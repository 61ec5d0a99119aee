# SPDX-License-Identifier: Apache-2.0
"""The keys of NeMo-Aligner's files that have other names here, or are accepted and change nothing."""

# The keys of NeMo-Aligner's that are known here by another name.
RENAMED = {
    "model.dpo.average_log_probs": "model.dpo.preference_average_log_probs",
    "model.rs": "model.ppo",
    "model.ppo.num_rollouts_per_prompt": "model.ppo.num_responses_per_prompt",
    "model.ppo.top_n_rollouts": "trainer.ppo.top_n",
    "trainer.rs": "trainer.ppo",
}

# (key, values that ask for nothing, what happens instead). No key that changes numbers may stand here.
NO_EFFECT: tuple[tuple[str, tuple[object, ...], str], ...] = (
    ("trainer.accelerator", ("gpu",), "a GPU is used where there is one, else the CPU"),
    ("trainer.logger", (False,), "exp_manager makes the loggers"),
    ("trainer.enable_checkpointing", (False,), "exp_manager saves"),
    ("trainer.use_distributed_sampler", (False,), "the loader deals batches out to ranks"),
    ("trainer.max_epochs", (), "max_epochs of the algorithm's own block counts, as in trainer.sft"),
    ("trainer.max_steps", (), "max_steps of the algorithm's own block counts, as in trainer.sft"),
    ("model.global_batch_size", (), "model.data.train_ds.global_batch_size counts"),
    ("model.micro_batch_size", (), "model.data.train_ds.micro_batch_size counts"),
    ("model.mcore_gpt", (True,), "models always are megatron-core's"),
    ("model.megatron_amp_O2", (False,), "weights are in trainer.precision, the optimizer keeps fp32 copies"),
    (
        "model.save_nemo_on_validation_end",
        (False,),
        "every checkpoint is a model; the .nemo is written at the end",
    ),
    ("model.steerlm2", ({},), "supervised fine-tuning reads none of it"),
    *(
        (f"model.data.{split}.{name}", idle, instead)
        for split in ("train_ds", "validation_ds")
        for name, idle, instead in (
            ("memmap_workers", (), "one pass over the file finds its lines"),
            ("min_seq_length", (0, 1), "a sample of any length is used"),
            ("index_mapping_dir", (), "the index of lines is kept in memory"),
            ("hf_dataset", (False,), "the file is read as JSONL either way"),
            ("output_original_text", (True,), "samples carry tokens only"),
            # Of the scripts whose files data_prefix names; train_gpt_sft.py's has an effect.
            (
                "shuffle",
                (False,),
                "the trainer's sampler orders rows, as trainer.rm.train_random_sampler says",
            ),
        )
    ),
    ("model.data.skip_warmup", (True,), "files are read when rows are asked for"),
    ("model.data.index_mapping_dir", (), "the index of lines is kept in memory"),
    ("model.data.eod_mask_loss", (False,), "what is learned goes by position, never by token"),
    ("model.data.shuffle_documents", (False,), "a row is a document, and the trainer's sampler orders rows"),
    ("model.overwrite_base_config", ({"data": {"data_prefix": True}},), "a checkpoint's data are not read"),
    (
        "trainer.ppo.batch_iterator",
        ({"use_flask": False, "port": 5557},),
        "each rank's slots refill, and rows are dealt out by length",
    ),
    ("trainer.ppo.flask_server", (), "each rank's slots refill, and rows are dealt out by length"),
    (
        "trainer.ppo.pad_sequence_length_to_multiple",
        (),
        "rows are padded to their longest, or as trainer.ppo.strip_sequence_length_to_multiple says",
    ),
    ("trainer.ppo.trt_model_dir", ("/tmp/trt_llm_model",), "the trained model itself generates"),
    ("model.ppo.sampling_params.all_probs", (False,), "log-probs of the drawn tokens always come along"),
    ("model.ppo.sampling_params.compute_logprob", (False,), "log-probs always come along"),
    ("exp_manager.checkpoint_callback_params.model_parallel_size", (), "a checkpoint loads at any layout"),
    *(
        (f"model.{name}", (False,), "the kernels follow from what is installed")
        for name in (
            "transformer_engine",
            "apply_rope_fusion",
            "bias_dropout_add_fusion",
            "masked_softmax_fusion",
            "gradient_accumulation_fusion",
            "persist_layer_norm",
        )
    ),
    *(
        (
            f"model.{name}",
            (False,),
            "Megatron's schedules and its distributed optimizer decide how ranks exchange tensors",
        )
        for name in (
            "sync_batch_comm",
            "gradient_as_bucket_view",
            "grad_div_ar_fusion",
            "grad_allreduce_chunk_size_mb",
            "async_grad_allreduce",
            "overlap_p2p_comm",
            "batch_p2p_comm",
            "ub_tp_comm_overlap",
            "ub_tp_comm_overlap_cfg",
            "defer_embedding_wgrad_compute",
        )
    ),
    *(
        (
            f"model.dist_ckpt_{name}",
            (),
            "checkpoints are written in parallel by all ranks, in the torch_dist format",
        )
        for name in (
            "format",
            "load_on_device",
            "parallel_save",
            "parallel_save_within_dp",
            "parallel_load",
            "parallel_dist_opt",
            "torch_dist_multiproc",
            "assume_constant_structure",
        )
    ),
    ("model.dist_ckpt_load_strictness", ("log_all",), "what is stored must fit the model"),
    ("model.optim.contiguous_grad_buffer", (True,), "Megatron's gradients always share buffers"),
    ("model.offload_adam_states", (), "model.ppo.offload_adam_states counts"),
    ("model.forward_mbs", (), "model.forward_micro_batch_size counts"),
    ("model.enable_nge", (), "responses are generated by one engine"),
    ("model.use_cpu_initialization", (False,), "weights come from the checkpoint"),
    ("model.nsys_profile", ({},), "there is no profiler within"),
)
ACCEPTED = frozenset(key for key, _, _ in NO_EFFECT)
