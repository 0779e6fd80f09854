/** Variants come and go: what the administrator may do, with a key that stays in this page's memory. */

import { useEffect, useRef, useState } from "preact/hooks";
import { adminCall, KeyNeeded, setAdminKey } from "./api";
import { bytes, percent } from "./format";
import type { Change, Held, VersionCard } from "./types";

const LOOK = 500; // milliseconds, while something is going on
const REST = 3000;
const ALL = "-"; // in place of a name: a change of all variants

export type Action = "add" | "replace" | "alias" | "rollback" | "remove" | "pin" | "unpin" | "replan";

export interface Wanted {
  action: Action;
  name: string;
  source: string; // or what an alias shall mean
  bits: string; // "" is lossless, "auto" what there is room for
}

/** What an action asks of the server: method, path below /v1/variants, body. */
export function request(wanted: Wanted): [method: string, path: string, body?: unknown] {
  const path = `/${encodeURIComponent(wanted.name.trim())}`;
  const source = { source: wanted.source.trim(), ...(wanted.bits === "" ? {} : { bits: wanted.bits === "auto" ? "auto" : Number(wanted.bits) }) };
  switch (wanted.action) {
    case "add":
      return ["POST", "", { name: wanted.name.trim(), ...source }];
    case "replace":
      return ["PUT", path, source];
    case "alias":
      return ["POST", `${path}/alias`, { to: wanted.source.trim() }];
    case "rollback":
      return ["POST", `${path}/rollback`];
    case "remove":
      return ["DELETE", path];
    case "pin":
    case "unpin":
      return ["POST", `${path}/pin`, { pinned: wanted.action === "pin" }];
    case "replan":
      return ["POST", `/${ALL}/replan`, {}];
  }
}

export function isOpen(change: Change): boolean {
  return change.state !== "done" && change.state !== "failed";
}

/** What is going on, and what failed; what is done shows in the table. */
export function toShow(changes: Change[]): Change[] {
  return changes.filter((change) => change.state !== "done");
}

export function Admin({ enabled, onChanged }: { enabled: boolean; onChanged: () => void }) {
  const [open, setOpen] = useState(false);
  return (
    <section class="card wide" aria-labelledby="admin-title">
      <h2 id="admin-title">Change what is served</h2>
      {!enabled ? (
        <p class="muted">
          Off. Start the server with --admin-key-file, --max-variants and --variants-root to add, replace and remove variants
          while it serves.
        </p>
      ) : open ? (
        <Panel
          onChanged={onChanged}
          onLeave={() => {
            setAdminKey(null);
            setOpen(false);
          }}
        />
      ) : (
        <AdminKey
          onOpen={() => {
            setOpen(true);
          }}
        />
      )}
    </section>
  );
}

function AdminKey({ onOpen }: { onOpen: () => void }) {
  const [text, setText] = useState("");
  const [problem, setProblem] = useState("");

  async function tryKey(): Promise<void> {
    setAdminKey(text);
    try {
      await adminCall<Held>("GET", "");
      onOpen();
    } catch (error) {
      setAdminKey(null);
      setProblem(error instanceof Error ? error.message : String(error));
    }
  }

  return (
    <form
      onSubmit={(event) => {
        event.preventDefault();
        void tryKey();
      }}
    >
      <label class="block">
        Admin key
        <input
          type="password"
          autocomplete="off"
          value={text}
          onInput={(event) => {
            setText(event.currentTarget.value);
          }}
        />
      </label>
      <button type="submit" class="main" disabled={text === ""}>
        Unlock
      </button>
      <p class="muted">It is not the clients' key. It stays in this page's memory and is gone when the page is closed.</p>
      <Problem text={problem} />
    </form>
  );
}

function Problem({ text }: { text: string }) {
  return text === "" ? null : (
    <p class="error" role="alert">
      {text}
    </p>
  );
}

function Panel({ onChanged, onLeave }: { onChanged: () => void; onLeave: () => void }) {
  const [held, setHeld] = useState<Held | null>(null);
  const [problem, setProblem] = useState("");
  const [said, setSaid] = useState("");
  const [asked, setAsked] = useState(0); // looks at once after an action
  const wasOpen = useRef(false);

  useEffect(() => {
    let timer = 0;
    let gone = false;

    async function look(): Promise<void> {
      let wait = REST;
      try {
        const found = await adminCall<Held>("GET", "");
        if (gone) return;
        setHeld(found);
        const open = found.changes.some(isOpen);
        if (wasOpen.current && !open) onChanged();
        wasOpen.current = open;
        if (open) wait = LOOK;
      } catch (error) {
        if (gone) return;
        if (error instanceof KeyNeeded) {
          onLeave();
          return;
        }
        setProblem(error instanceof Error ? error.message : String(error));
      }
      timer = setTimeout(() => void look(), wait);
    }

    void look();
    return () => {
      gone = true;
      clearTimeout(timer);
    };
  }, [asked]);

  async function act(wanted: Wanted): Promise<boolean> {
    setProblem("");
    setSaid("");
    try {
      await adminCall<unknown>(...request(wanted));
      setSaid(`${wanted.action === "replan" ? "the bundle" : wanted.name}: ${wanted.action}`);
      wasOpen.current = true; // it may be done before the next look
      setAsked((count) => count + 1);
      return true;
    } catch (error) {
      if (error instanceof KeyNeeded) onLeave();
      setProblem(error instanceof Error ? error.message : String(error));
      return false;
    }
  }

  if (held === null) return <p class="muted">Asking the server …</p>;
  return (
    <>
      <Versions held={held} onAct={(wanted) => void act(wanted)} />
      <p class="muted">
        {held.data.length} of {held.max_variants} versions; {bytes(held.added_bytes)} added
        {held.headroom === null ? "" : ` of ${bytes(held.headroom)}`}.
      </p>
      {toShow(held.changes).map((change) => (
        <Progress key={change.name} change={change} />
      ))}
      <NewChange names={[...new Set(held.data.flatMap((card) => card.names))]} onAct={act} />
      <p class="muted" role="status">
        {said}
      </p>
      <Problem text={problem} />
      <div class="controls">
        <button type="button" onClick={() => void act({ action: "replan", name: ALL, source: "", bits: "" })}>
          Plan the bundle anew
        </button>
        <button type="button" onClick={onLeave}>
          Lock
        </button>
      </div>
    </>
  );
}

function Progress({ change }: { change: Change }) {
  const name = change.name === ALL ? "the bundle" : change.name;
  if (change.error !== null) {
    return (
      <p class="error">
        {name}: {change.kind} failed: {change.error.message}
      </p>
    );
  }
  return (
    <label class="block">
      {name}: {change.stage === "" ? change.state : change.stage}, {percent(change.fraction, 0)}
      <progress max={1} value={change.fraction} />
    </label>
  );
}

function Versions({ held, onAct }: { held: Held; onAct: (wanted: Wanted) => void }) {
  return (
    <div class="scroll" tabIndex={0} role="region" aria-label="Table of versions">
      <table>
        <thead>
          <tr>
            {["names", "version", "state", "own bytes", "in flight", "source", "actions"].map((name) => (
              <th key={name} scope="col">
                {name}
              </th>
            ))}
          </tr>
        </thead>
        <tbody>
          {held.data.map((card) => (
            <Version key={card.version} card={card} onAct={onAct} />
          ))}
        </tbody>
      </table>
    </div>
  );
}

function Version({ card, onAct }: { card: VersionCard; onAct: (wanted: Wanted) => void }) {
  const [sure, setSure] = useState(""); // the name whose removal was asked for once
  const version = `${card.name}@${card.version.slice(0, 12)}`;
  const pin: Action = card.pinned ? "unpin" : "pin";
  return (
    <tr>
      <th scope="row">{card.names.length === 0 ? `(${card.name})` : card.names.join(", ")}</th>
      <td>
        <code title={card.version}>{card.version.slice(0, 8)}</code>
      </td>
      <td>
        {card.state}
        {card.pinned ? ", pinned" : ""}
      </td>
      <td class="number">{card.bytes === 0 ? "planned" : bytes(card.bytes)}</td>
      <td class="number">{card.in_flight ?? 0}</td>
      <td class="path">{card.source}</td>
      <td class="actions">
        <button
          type="button"
          aria-label={`${pin} ${version}`}
          onClick={() => {
            onAct({ action: pin, name: version, source: "", bits: "" });
          }}
        >
          {pin}
        </button>
        {card.previous_of.map((name) => (
          <button
            key={`back ${name}`}
            type="button"
            onClick={() => {
              onAct({ action: "rollback", name, source: "", bits: "" });
            }}
          >
            roll {name} back to this
          </button>
        ))}
        {card.names.map((name) => (
          <button
            key={`remove ${name}`}
            type="button"
            class={sure === name ? "danger" : ""}
            onBlur={() => {
              setSure("");
            }}
            onClick={() => {
              if (sure === name) onAct({ action: "remove", name, source: "", bits: "" });
              setSure(sure === name ? "" : name);
            }}
          >
            {sure === name ? `really remove ${name}` : `remove ${name}`}
          </button>
        ))}
      </td>
    </tr>
  );
}

function NewChange({ names, onAct }: { names: string[]; onAct: (wanted: Wanted) => Promise<boolean> }) {
  const [wanted, setWanted] = useState<Wanted>({ action: "add", name: "", source: "", bits: "" });
  const alias = wanted.action === "alias";
  const set = (change: Partial<Wanted>) => {
    setWanted({ ...wanted, ...change });
  };
  return (
    <form
      class="controls"
      aria-label="New change"
      onSubmit={(event) => {
        event.preventDefault();
        void onAct(wanted).then((done) => {
          if (done) set({ name: "", source: "" });
        });
      }}
    >
      <label>
        Action
        <select
          value={wanted.action}
          onChange={(event) => {
            set({ action: event.currentTarget.value as Action });
          }}
        >
          <option value="add">add</option>
          <option value="replace">replace</option>
          <option value="alias">alias</option>
        </select>
      </label>
      <label>
        Name
        <input
          list="variant-names"
          autocomplete="off"
          value={wanted.name}
          onInput={(event) => {
            set({ name: event.currentTarget.value });
          }}
        />
      </label>
      <datalist id="variant-names">
        {names.map((name) => (
          <option key={name} value={name} />
        ))}
      </datalist>
      <label>
        {alias ? "Means" : "Source"}
        <input
          autocomplete="off"
          placeholder={alias ? "a variant, or name@version" : "path, or BASE+CHANGE"}
          value={wanted.source}
          onInput={(event) => {
            set({ source: event.currentTarget.value });
          }}
        />
      </label>
      {alias ? null : (
        <label>
          Corrections
          <select
            value={wanted.bits}
            onChange={(event) => {
              set({ bits: event.currentTarget.value });
            }}
          >
            <option value="">lossless</option>
            <option value="auto">as many bits as fit</option>
            {["5", "4", "3", "2", "1"].map((bits) => (
              <option key={bits} value={bits}>
                {bits} bits
              </option>
            ))}
          </select>
        </label>
      )}
      <button type="submit" class="main" disabled={wanted.name.trim() === "" || wanted.source.trim() === ""}>
        {wanted.action}
      </button>
    </form>
  );
}
