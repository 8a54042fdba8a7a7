/* cuda_names.h - from here on the names of train_vivim.c's operations, and of the model's graph, mean the GPU's: op is op_cuda.
   Included by train_vivim.cu behind its operations; behind it comes train_vivim.c's graph once more. */
#ifndef VIVIM_CUDA_NAMES_H
#define VIVIM_CUDA_NAMES_H

// memory and operations: written in train_vivim.cu
#define matmul matmul_cuda
#define matmul_forward matmul_forward_cuda
#define matmul_backward matmul_backward_cuda
#define add_column_sums add_column_sums_cuda
#define layernorm_forward layernorm_forward_cuda
#define layernorm_backward layernorm_backward_cuda
#define gelu_forward gelu_forward_cuda
#define gelu_backward gelu_backward_cuda
#define relu_forward relu_forward_cuda
#define relu_backward relu_backward_cuda
#define residual residual_cuda
#define dwconv_forward dwconv_forward_cuda
#define dwconv_backward dwconv_backward_cuda
#define conv_forward conv_forward_cuda
#define conv_backward conv_backward_cuda
#define attention_forward attention_forward_cuda
#define attention_backward attention_backward_cuda
#define conv1d_silu_forward conv1d_silu_forward_cuda
#define conv1d_silu_backward conv1d_silu_backward_cuda
#define selective_scan_forward selective_scan_forward_cuda
#define selective_scan_backward selective_scan_backward_cuda
#define selective_scan_states selective_scan_states_cuda
#define softplus_forward softplus_forward_cuda
#define softplus_backward softplus_backward_cuda
#define gate_forward gate_forward_cuda
#define gate_backward gate_backward_cuda
#define bilinear_forward bilinear_forward_cuda
#define bilinear_backward bilinear_backward_cuda
#define bilinear_add3 bilinear_add3_cuda
#define batchnorm_statistics batchnorm_statistics_cuda
#define batchnorm_vectors batchnorm_vectors_cuda
#define dropout_factors dropout_factors_cuda
#define head_forward head_forward_cuda
#define head_backward_params head_backward_params_cuda
#define head_backward_map head_backward_map_cuda
#define segloss_forward segloss_forward_cuda
#define segloss_backward segloss_backward_cuda
#define sobel_edges sobel_edges_cuda
#define edgeloss_forward edgeloss_forward_cuda
#define edgeloss_backward edgeloss_backward_cuda
#define patches_forward patches_forward_cuda
#define patches_backward patches_backward_cuda
#define norms_forward norms_forward_cuda
#define norms_backward norms_backward_cuda
#define scaled_sum scaled_sum_cuda
#define all_finite all_finite_cuda
#define adam_update adam_update_cuda
#define zero_floats zero_floats_cuda
#define malloc_check malloc_check_cuda
#define calloc_check calloc_check_cuda
#define malloc_floats malloc_floats_cuda
#define free_check free_check_cuda
#define arena_reserve arena_reserve_cuda
#define arena_free arena_free_cuda

// the graph: the same lines of train_vivim.c
#define keep keep_cuda
#define scratch scratch_cuda
#define linear_forward linear_forward_cuda
#define linear_backward linear_backward_cuda
#define norm_forward norm_forward_cuda
#define norm_backward norm_backward_cuda
#define self_attention_forward self_attention_forward_cuda
#define self_attention_backward self_attention_backward_cuda
#define ffn_forward ffn_forward_cuda
#define ffn_backward ffn_backward_cuda
#define scan_inputs scan_inputs_cuda
#define st_mamba_forward st_mamba_forward_cuda
#define st_mamba_backward st_mamba_backward_cuda
#define drop_probability drop_probability_cuda
#define sublayer_forward sublayer_forward_cuda
#define sublayer_backward sublayer_backward_cuda
#define fuse_block fuse_block_cuda
#define decoder_fold decoder_fold_cuda
#define decoder_map decoder_map_cuda
#define logits_frame logits_frame_cuda
#define logits_frames logits_frames_cuda
#define decoder_forward decoder_forward_cuda
#define decoder_backward decoder_backward_cuda
#define edge_forward edge_forward_cuda
#define edge_backward edge_backward_cuda
#define model_forward model_forward_cuda
#define model_backward model_backward_cuda
#define model_trainable model_trainable_cuda
#define model_measure model_measure_cuda
#define model_plan model_plan_cuda
#define model_zero_grad model_zero_grad_cuda
#define model_update model_update_cuda
#define affine_net_forward affine_net_forward_cuda
#define affine_net_backward affine_net_backward_cuda
#define affine_forward affine_forward_cuda
#define affine_backward affine_backward_cuda
#define affine_term_free affine_term_free_cuda
#define loss_and_gradient loss_and_gradient_cuda

#endif
