/** The page: asks for the key, waits while the model loads, then shows one of its parts. */

import { useEffect, useMemo, useRef, useState } from "preact/hooks";
import { Admin } from "./admin";
import { events, getJson, KeyNeeded, setKey } from "./api";
import { Dial } from "./dial";
import { percent } from "./format";
import { History } from "./history";
import { Live } from "./live";
import { ExpertMap } from "./map";
import { Memory } from "./memory";
import { Playground } from "./playground";
import { merge, Requests } from "./requests";
import { decodeUint16, Heat } from "./sharing";
import type { About, Bundle, RequestRecord, Routing, Snapshot } from "./types";
import { Variants } from "./variants";

const TABS = [
  ["overview", "Overview"],
  ["live", "Live"],
  ["playground", "Playground"],
  ["requests", "Requests"],
  ["variants", "Variants"],
] as const;
const RETRY = 2000; // milliseconds
type Tab = (typeof TABS)[number][0];

function tabOf(hash: string): Tab {
  return TABS.find(([name]) => `#${name}` === hash)?.[0] ?? "overview";
}

export function App() {
  const [tab, setTab] = useState<Tab>(tabOf(location.hash));
  const [keyAsked, setKeyAsked] = useState<string | null>(null);
  const [attempt, setAttempt] = useState(0);
  const [about, setAbout] = useState<About | null>(null);
  const [bundle, setBundle] = useState<Bundle | null>(null);
  const [problem, setProblem] = useState("");
  const [records, setRecords] = useState<RequestRecord[]>([]);
  const [beat, setBeat] = useState(0); // one a snapshot: charts look at `history`
  const [warmth, setWarmth] = useState(0);
  const history = useRef(new History());
  const heat = useMemo(
    () => (bundle === null ? undefined : new Heat(bundle.variants.length, bundle.layers.length, bundle.num_experts)),
    [bundle],
  );
  const heatNow = useRef(heat);
  heatNow.current = heat;

  useEffect(() => {
    const changed = () => {
      setTab(tabOf(location.hash));
    };
    addEventListener("hashchange", changed);
    return () => {
      removeEventListener("hashchange", changed);
    };
  }, []);

  useEffect(() => {
    const control = new AbortController();
    let timer = 0;

    function take(name: string, data: string): void {
      if (name === "history") history.current.reset(JSON.parse(data) as Snapshot[]);
      if (name === "snapshot") history.current.add(JSON.parse(data) as Snapshot);
      if (name === "requests") {
        const changed = JSON.parse(data) as RequestRecord[];
        setRecords((known) => merge(known, changed));
      }
      if (name === "routing") {
        const routing = JSON.parse(data) as Routing;
        heatNow.current?.add(decodeUint16(routing.counts), routing.scale);
        setWarmth((count) => count + 1);
      }
      if (name === "history" || name === "snapshot") setBeat((count) => count + 1);
    }

    async function watch(): Promise<void> {
      try {
        setAbout(await getJson<About>("/ui/about"));
        setKeyAsked(null);
        setProblem("");
        setRecords([]);
        for await (const event of events("/ui/events", control.signal)) take(event.name, event.data);
        setProblem("The server has ended the connection; trying again.");
      } catch (error) {
        if (control.signal.aborted) return;
        if (error instanceof KeyNeeded) {
          setKeyAsked(attempt === 0 ? "" : error.message);
          return;
        }
        setProblem(`No connection to the server (${error instanceof Error ? error.message : String(error)}); trying again.`);
      }
      if (!control.signal.aborted) timer = setTimeout(() => void watch(), RETRY);
    }

    void watch();
    return () => {
      control.abort();
      clearTimeout(timer);
    };
  }, [attempt]);

  const now = history.current.latest;
  const ready = now?.status === "ready" || now?.status === "draining";
  const revision = now?.revision ?? 0;
  useEffect(() => {
    if (!ready) return;
    getJson<Bundle>("/ui/bundle").then(setBundle, (error: unknown) => {
      setProblem(error instanceof Error ? error.message : String(error));
    });
  }, [ready, beat > 0 && bundle === null, revision]);

  const names = now?.variants ?? [];
  return (
    <>
      <a class="skip" href="#main">
        Skip to the content
      </a>
      <header>
        <h1>polymoe</h1>
        <nav aria-label="Parts">
          {TABS.map(([name, title]) => (
            <a key={name} href={`#${name}`} aria-current={tab === name ? "page" : undefined}>
              {title}
            </a>
          ))}
        </nav>
        <span class={`status ${now?.status ?? ""}`} role="status">
          {now?.status ?? "connecting"}
        </span>
      </header>
      <main id="main">
        {problem === "" ? null : (
          <p class="error card wide" role="alert">
            {problem}
          </p>
        )}
        {keyAsked !== null ? (
          <KeyForm
            message={keyAsked}
            onKey={(key) => {
              setKey(key);
              setAttempt((count) => count + 1);
            }}
          />
        ) : bundle === null ? (
          <Loading about={about} now={now} />
        ) : (
          <>
            {tab === "overview" ? (
              <div class="cards two">
                <ExpertMap bundle={bundle} {...(heat === undefined ? {} : { heat })} beat={warmth} />
                <Memory bundle={bundle} />
                <Dial bundle={bundle} />
              </div>
            ) : null}
            {tab === "live" ? <Live history={history.current} variants={names} /> : null}
            <div hidden={tab !== "playground"}>
              <Playground bundle={bundle} />
            </div>
            {tab === "requests" ? <Requests records={records} logsPrompts={about?.log_prompts === true} /> : null}
            {tab === "variants" ? (
              <>
                <Variants bundle={bundle} />
                <Admin
                  enabled={about?.admin === true}
                  onChanged={() => {
                    setBeat((count) => count + 1);
                  }}
                />
              </>
            ) : null}
          </>
        )}
      </main>
      <footer class="muted">polymoe {about?.version ?? ""}</footer>
    </>
  );
}

function Loading({ about, now }: { about: About | null; now: Snapshot | undefined }) {
  const [stage, fraction] = now === undefined ? [about?.stage ?? "", about?.fraction ?? 0] : [now.stage, now.fraction];
  if (now?.status === "dead") {
    return (
      <section class="card wide">
        <h2>The engine has stopped</h2>
        <p>The server's log says why.</p>
      </section>
    );
  }
  return (
    <section class="card wide" aria-labelledby="loading-title">
      <h2 id="loading-title">Loading</h2>
      <label class="block">
        {stage === "" ? "starting" : stage}, {percent(fraction, 0)}
        <progress max={1} value={fraction} />
      </label>
    </section>
  );
}

function KeyForm({ message, onKey }: { message: string; onKey: (key: string) => void }) {
  const [text, setText] = useState("");
  return (
    <form
      class="card wide"
      onSubmit={(event) => {
        event.preventDefault();
        onKey(text);
      }}
    >
      <h2>This server wants a key</h2>
      <label class="block">
        API key
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
        Use it
      </button>
      <p class="muted">It stays in this page's memory and is gone when the page is closed.</p>
      {message === "" ? null : (
        <p class="error" role="alert">
          {message}
        </p>
      )}
    </form>
  );
}
