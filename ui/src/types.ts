/** What the server sends: see src/polymoe/bundle/describe.py, server/snapshots.py and server/request_log.py. */

export interface Fidelity {
  text: string;
  tokens: number;
  kl: number;
  top1: number;
  perplexity_original: number;
  perplexity_served: number;
}

export interface Variant {
  name: string;
  version: string;
  source: string;
  max_model_len: number;
  dtype: string;
  predicted_damage: number | null;
  fidelity: Fidelity | null;
}

export interface DialPoint {
  expert_bytes: number;
  kl: number;
  top1: number;
}

export interface FastPath {
  part: string;
  runs_on: string;
  count: number;
  reason: string;
  slow: boolean;
}

export interface Engine {
  device: string;
  dtype: string;
  slots: number;
  num_kv_blocks: number;
  block_size: number;
  max_concurrency: number;
  device_bytes: number | null;
  workspace_bytes: number;
  resident_bytes: Record<string, number>;
  experts_resident: number;
  experts_absent: number;
  fast_paths: FastPath[];
  max_model_len: number[];
  faults: Record<string, string>;
  chat: Record<string, boolean>;
}

export interface Bundle {
  name: string;
  policy: string;
  memory: string;
  architecture: string;
  polymoe_version: string;
  layers: string[];
  num_experts: number;
  expert_bytes: number;
  variants: Variant[];
  base_pools: Record<string, number>[];
  delta_pools: Record<string, number>[];
  base_bytes: Record<string, number>[];
  delta_bytes: Record<string, number>[];
  table: string;
  delta: string | null;
  position_errors: number[][] | null;
  dial: DialPoint[];
  dial_of: "experts" | "all";
  resident_bytes: Record<string, number>;
  host_bytes: number;
  added_bytes: number[];
  separate_bytes: number[];
  engine?: Engine;
}

export interface About {
  version: string;
  ready: boolean;
  stage: string;
  fraction: number;
  log_prompts: boolean;
  admin: boolean;
}

/** What `/v1/variants` answers: src/polymoe/server/variant_fields.py. */
export interface VersionCard {
  name: string;
  version: string;
  names: string[];
  state: string;
  pinned: boolean;
  previous_of: string[];
  source: string;
  bytes: number;
  in_flight: number | null;
}

export interface Change {
  name: string;
  kind: string;
  state: string;
  stage: string;
  fraction: number;
  error: { message: string } | null;
}

export interface Held {
  data: VersionCard[];
  changes: Change[];
  max_variants: number;
  headroom: number | null;
  added_bytes: number;
}

export type Percentiles = [p50: number, p95: number, p99: number] | null;

export interface Snapshot {
  time: number;
  status: string;
  stage: string;
  fraction: number;
  variants: string[];
  revision: number; // of the set of variants
  running: number[];
  waiting: number[];
  kv_usage: number;
  tokens: number[];
  prompt_tokens: number[];
  errors: number[];
  ttft: Percentiles[];
  itl: Percentiles[];
  prefix_queries: number;
  prefix_hits: number;
  preemptions: number;
  reconfigurations: number;
  reconfiguration_bytes: number;
  host_bytes: number;
  resident_bytes: Record<string, number>;
}

export interface RequestRecord {
  number: number;
  id: string;
  time: number;
  variant: string;
  version: string;
  tenant: string;
  kind: string;
  prompt_tokens: number;
  tokens: number;
  first_token: number | null;
  duration: number | null;
  finish: string | null;
  error: string | null;
  prompt: string | null;
}

export interface Routing {
  scale: number;
  variants: number;
  counts: string;
}
