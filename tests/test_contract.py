"""What training and fine-tuning promise their users, each promise with the tests that hold it."""
import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PROMISES = {
    "the config comes first; -h anywhere is usage": "run_sh: without_a_config_the_usage_goes_to_stderr, help_anywhere_launches_nothing, anything_else_first_is_refused",
    "-n: one process a GPU, at most 8; obeyed or refused": "ranks: the_default_is_the_gpus_and_an_explicit_number_is_obeyed_or_refused, what_is_launched_and_what_is_said_of_it, "
        "a_gpu_that_is_not_there_is_said_once; run_sh: the_number_of_processes_is_handed_on_only_where_it_is_given, a_process_count_that_is_none",
    "-p resumes exactly; the same line goes on, or starts afresh, or is refused": "real_run: killed_at_random_moments_while_saving_too, "
        "the_same_line_after_a_finished_run_starts_afresh, another_configs_folder_is_refused, resuming_finished_training_says_there_is_nothing_left; "
        "ranks: saved_on_two_resumed_on_one_and_back, a_run_saved_on_some_gpus_goes_on_on_others; config_checkpoint: unfinished_run_continues, finished_run_moves_aside",
    "-s counts shards from 1 and wraps": "run_sh: begin_shard_counts_from_one, begin_shard_is_exported_only_when_asked_for; "
        "real_run: begin_shard_comes_from_the_environment_and_wraps",
    "--ignore-prior-schedule in four spellings really trains": "run_sh: four_spellings_are_one_flag; real_run: a_fresh_schedule_really_trains",
    "key=value, typed, in any order; the command line beats YAML beats checkpoint": "run_sh: any_order, overrides_with_and_without_dashes; "
        "config_checkpoint: overrides, bad_overrides_are_one_line, precedence; real_run: the_command_line_beats_the_checkpoint_where_the_weights_allow_it",
    "the same tokens in the same steps on any number of ranks": "ranks: several_ranks_give_the_losses_of_one, a_batch_that_does_not_divide_is_one_line, "
        "the_mean_is_over_the_targets_of_all_ranks, two_gpus_give_the_losses_of_one; real_run: accumulation_takes_the_same_steps; config_checkpoint: accumulation_against_brute_force",
    "defaults of the environment, several machines, signals arrive": "run_sh: thread_settings_are_made_only_where_the_user_has_not, "
        "torchruns_flags_for_several_machines_are_handed_on, signals_arrive, the_slurm_recipe_starts_run_sh_on_every_node, "
        "the_skypilot_recipe_starts_run_sh_on_every_node; ranks: two_nodes_of_one_process, a_signal_to_the_launcher_saves_and_leaves, "
        "a_killed_rank_ends_the_run_in_one_line",
    "any GPU or a CPU; memory that doesn't fit names the setting": "real_run: memory_that_does_not_fit_names_the_setting_to_lower",
    "train.py --help lists every key without a GPU": "real_run: help_lists_every_key_without_a_gpu; config_checkpoint: help_lists_every_key_with_type_and_default",
    "train.py CONFIG key=value is run.sh with one process": "real_run: sigterm_saves_and_leaves_with_its_code, no_config_is_usage_and_2; "
        "ranks: what_is_launched_and_what_is_said_of_it",
    "every YAML key is checked; a glob without a match names the way to the data": "real_run: a_mistake_is_one_line, without_shards_one_line_names_the_download, "
        "print_config_shows_the_run_and_starts_nothing; config_checkpoint: bad_yaml_names_file_line_and_rule, every_config_loads_and_its_batch_comes_out_even",
    "validations and snapshots at their steps, at the end and on a signal": "trainer: when_it_validates_and_when_it_saves, a_signal_lets_the_step_end_and_saves_it, "
        "save_checkpoint_false_never_saves; real_run: save_checkpoint_false_writes_none",
    "an unknown model_type lists the known": "real_run: a_mistake_is_one_line",
    "checkpoints are whole or refused": "config_checkpoint: keeps_the_last_written, killed_at_each_call_of_a_save, a_background_save_is_of_the_moment_and_uses_its_memory_again, full_disk, read_only_folder, "
        "bad_files_are_refused_by_name_and_reason; real_run: a_checkpoint_that_is_none_is_refused, a_disk_that_fills_up_leaves_the_last_checkpoint, "
        "a_folder_that_cannot_be_written_is_one_line, a_checkpoint_of_an_older_daisy_loads",
    "all ranks see the same": "ranks: several_ranks_give_the_losses_of_one, a_mistake_that_all_ranks_notice_is_said_once; trainer: evaluate_counts_each_target_once",
    "progress in a bar, in lines, in a log, in TensorBoard, in a picture": "trainer: in_a_log_there_are_lines_and_no_blanks, a_terminal_gets_a_bar, "
        "mfu_is_logged_only_where_the_peak_is_known, mfu_counts_the_windows_of_its_step, peaks_of_gpus, a_log_survives_what_a_kill_leaves; real_run: log_and_checkpoint_say_what_made_them, "
        "tensorboard_draws_what_is_logged_and_is_asked_for_by_name, runs_are_drawn_over_each_other",
    "shards for fine-tuning from files, the hub and Python itself, by weight to a budget, the same for the same sources": "sft: "
        "every_conversation_is_in_one_split_once, any_format_gives_the_same_bytes, messages_in_parquet_are_read_as_they_are_nested, "
        "the_order_of_rows_makes_no_difference_and_the_seed_does, weights_divide_the_budget, a_budget_bounds_what_is_held, "
        "shares_add_up_and_keep_the_weights, a_bad_row_is_named_or_skipped_and_counted, what_cannot_be_built_is_one_line, "
        "a_build_that_fails_leaves_the_old_one, shards_of_others_are_not_touched, the_command_is_the_same_in_every_process, "
        "the_command_says_in_one_line_what_is_wrong, a_data_set_of_the_hub_by_its_name, a_hub_that_answers_nonsense_is_one_line, "
        "a_data_set_that_the_hub_lacks_and_no_hub_at_all, held_out_questions_are_in_no_training_text, "
        "the_shards_of_questions_hold_the_split_of_the_documents",
    "one template and END_OF_TEXT behind every response; loss on responses, or on all with loss_on_prompt": "sft: "
        "exactly_the_responses_are_scored, one_turn_is_the_template_in_any_vocabulary, what_is_no_conversation_is_one_line, "
        "decoding_stops_where_training_stopped, marks_round_trip_and_the_ids_stay_where_they_were, a_marked_shard_cut_anywhere_is_refused, "
        "marks_that_fit_nothing_are_not_written, a_reader_of_the_first_version_refuses_marked_shards, only_marked_targets_count_on_any_ranks, "
        "marked_batches_go_on_from_a_position, validation_scores_every_response_token_and_every_end_once, loss_on_prompt_scores_everything",
    "fine-tuning reuses model and trainer, starts from a checkpoint and really trains": "sft: pretrain_fine_tune_ask, "
        "the_newest_checkpoint_of_all_folders_is_sampled, without_a_checkpoint_one_line_says_what_to_type, without_shards_one_line_names_the_builder, "
        "instruct_configs_train_on_shards_of_ones_own, a_checkpoint_of_another_vocabulary_is_one_line",
    "a loss that is no number stops the run and overwrites nothing": "trainer: a_bad_loss_is_named_and_no_snapshot_follows, "
        "a_bad_gradient_under_a_good_loss_is_noticed_before_it_is_saved, a_bad_validation_is_noticed_before_it_is_saved; real_run: a_shard_that_vanishes_is_named",
}


@pytest.mark.parametrize("promise", PROMISES)
def test_a_promise_names_tests_that_exist(promise):
    for part in PROMISES[promise].split("; "):
        file, _, names = part.partition(": ")
        defined = {node.name for node in ast.parse((TESTS / f"test_{file}.py").read_text()).body if isinstance(node, ast.FunctionDef)}
        assert {f"test_{name}" for name in names.split(", ")} <= defined, {f"test_{name}" for name in names.split(", ")} - defined
