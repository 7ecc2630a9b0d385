//! `docs/openapi.json`, made of the router's table and the types that go over the
//! socket. `BGSWITCH_WRITE_OPENAPI=1` writes it anew.

use std::{env, fs, path::Path};

use schemars::{JsonSchema, SchemaGenerator, generate::SchemaSettings};
use serde_json::{Map, Value, json};

use super::routes;
use crate::{
    api::{
        Canaried, CanaryRequest, DecisionRequest, Explained, ExtendRequest, FlipRequest, Flipped,
        Flows, History, MonitorLine, OneService, Refusal, ReleaseRequest, ReleaseStatus, Reloaded,
        RollbackRequest, Status,
    },
    daemon::{
        events::Lost,
        requests::{
            EventsQuery, ExplainQuery, FlowsQuery, HistoryQuery, MonitorQuery, ReloadQuery,
        },
    },
};

/// Makes schemas of what is asked for, and of what is answered.
struct Schemas {
    asked: SchemaGenerator,
    answered: SchemaGenerator,
}

impl Schemas {
    fn new() -> Self {
        let settings = || {
            SchemaSettings::draft2020_12().with(|settings| {
                settings.definitions_path = "/components/schemas".into();
            })
        };
        Self {
            asked: settings().for_deserialize().into_generator(),
            answered: settings().for_serialize().into_generator(),
        }
    }

    fn asked<T: JsonSchema>(&mut self) -> Value {
        self.asked.subschema_for::<T>().to_value()
    }

    fn answered<T: JsonSchema>(&mut self) -> Value {
        self.answered.subschema_for::<T>().to_value()
    }

    /// The fields of a query, a parameter each.
    fn query<T: JsonSchema>(&mut self) -> Vec<Value> {
        let name = T::schema_name().into_owned();
        self.asked.subschema_for::<T>();
        let schema = self.asked.definitions_mut().remove(&name).unwrap();
        let required = schema["required"].as_array().cloned().unwrap_or_default();
        let properties = schema["properties"].as_object().unwrap().iter();
        properties
            .map(|(name, schema)| {
                let mut schema = schema.clone();
                let description = schema.as_object_mut().unwrap().remove("description");
                json!({"name": name, "in": "query", "description": description,
                    "required": required.contains(&json!(name)), "schema": schema})
            })
            .collect()
    }
}

/// What a request may be, and what answers it.
struct Operation {
    verb: &'static str,
    path: &'static str,
    summary: &'static str,
    query: Vec<Value>,
    body: Option<Value>,
    /// Media type and schema.
    answer: (&'static str, Value),
    /// May ask for a generation, and says one.
    generation: bool,
}

impl Operation {
    fn get(path: &'static str, summary: &'static str, answer: Value) -> Self {
        Self {
            verb: "GET",
            path,
            summary,
            query: Vec::new(),
            body: None,
            answer: ("application/json", answer),
            generation: false,
        }
    }

    fn post(path: &'static str, summary: &'static str, body: Value, answer: Value) -> Self {
        Self {
            verb: "POST",
            body: Some(body),
            ..Self::get(path, summary, answer)
        }
    }

    fn to_value(&self, refusal: &Value) -> Value {
        let (media, answer) = &self.answer;
        let mut parameters = self.query.clone();
        for part in self.path.split(['{', '}']).skip(1).step_by(2) {
            let schema = match part {
                "decision" => json!({"enum": ["approve", "reject", "abort", "pause", "resume"]}),
                _ => json!({"type": "string"}),
            };
            parameters
                .push(json!({"name": part, "in": "path", "required": true, "schema": schema}));
        }
        let mut done = json!({"description": "Done", "content": {*media: {"schema": answer}}});
        let json = json!({"application/json": {"schema": refusal}});
        let mut responses = json!({"default": {
            "description": "Refused: `kind`, `error` and `code` say why", "content": json}});
        let etag = json!({"schema": {"type": "string"},
            "description": "The generation, in quotes: what If-Match takes"});
        if self.generation {
            done["headers"] = json!({"ETag": etag});
        }
        if self.generation && self.verb == "POST" {
            parameters.push(
                json!({"name": "If-Match", "in": "header", "required": false,
                "description": "Only at this generation: the ETag of an earlier answer, or *",
                "schema": {"type": "string"}}),
            );
            responses["412"] = json!({"description": "Not at the generation of If-Match or `if_generation`, or not at `if_share`, where there is one",
                "content": json});
        }
        if self.path == "/v1/events" {
            parameters.push(
                json!({"name": "Last-Event-ID", "in": "header", "required": false,
                "description": "The id of the last event that was heard",
                "schema": {"type": "string"}}),
            );
        }
        responses["200"] = done;
        let mut operation = json!({"summary": self.summary, "parameters": parameters,
            "responses": responses});
        if let Some(body) = &self.body {
            operation["requestBody"] = json!({"required": false,
                "content": {"application/json": {"schema": body}}});
        }
        operation
    }
}

fn operations(schemas: &mut Schemas) -> Vec<Operation> {
    let service = "/v1/services/{service}";
    let generation = |operation| Operation {
        generation: true,
        ..operation
    };
    let (status, one) = (
        schemas.answered::<Status>(),
        schemas.answered::<OneService>(),
    );
    let (flipped, canaried) = (
        schemas.answered::<Flipped>(),
        schemas.answered::<Canaried>(),
    );
    let release = schemas.answered::<ReleaseStatus>();
    let decision = schemas.asked::<DecisionRequest>();
    let line = schemas.answered::<MonitorLine>();
    let lost = schemas.answered::<Lost>();
    let reload = schemas.answered::<Reloaded>();
    vec![
        Operation::get(
            "/v1/status",
            "What is live, what is draining, where packets went",
            status,
        ),
        generation(Operation::get(service, "One service of it", one)),
        generation(Operation::post(
            "/v1/services/{service}/flip",
            "New flows go to the other colour",
            schemas.asked::<FlipRequest>(),
            flipped.clone(),
        )),
        generation(Operation::post(
            "/v1/services/{service}/rollback",
            "Back at once; never refused for what a colour's state is",
            schemas.asked::<RollbackRequest>(),
            flipped,
        )),
        generation(Operation::post(
            "/v1/services/{service}/canary",
            "A share of new flows goes to the standby",
            schemas.asked::<CanaryRequest>(),
            canaried,
        )),
        Operation {
            query: schemas.query::<FlowsQuery>(),
            ..Operation::get(
                "/v1/services/{service}/flows",
                "Remembered flows",
                schemas.answered::<Flows>(),
            )
        },
        Operation {
            query: schemas.query::<HistoryQuery>(),
            ..Operation::get(
                "/v1/history",
                "The newest entries of the journal, oldest first",
                schemas.answered::<History>(),
            )
        },
        Operation {
            query: schemas.query::<EventsQuery>(),
            answer: (
                "text/event-stream",
                json!({"anyOf": [line, lost],
                "description": "The data of each event, as JSON: see docs/events.md"}),
            ),
            ..Operation::get(
                "/v1/events",
                "What happens, as server-sent events",
                Value::Null,
            )
        },
        Operation {
            query: schemas.query::<ReloadQuery>(),
            body: None,
            ..Operation::post(
                "/v1/reload",
                "Applies the configuration file",
                Value::Null,
                reload,
            )
        },
        Operation {
            query: schemas.query::<MonitorQuery>(),
            answer: ("application/x-ndjson", line),
            ..Operation::get(
                "/v1/monitor",
                "Packets and events as they come, a line each",
                Value::Null,
            )
        },
        Operation {
            query: schemas.query::<ExplainQuery>(),
            ..Operation::get(
                "/v1/explain",
                "What would become of a client's packets",
                schemas.answered::<Explained>(),
            )
        },
        generation(Operation::get(
            "/v1/services/{service}/release",
            "Where the release of the service is",
            release.clone(),
        )),
        generation(Operation::post(
            "/v1/services/{service}/release/start",
            "Begins a release",
            schemas.asked::<ReleaseRequest>(),
            release.clone(),
        )),
        Operation::post(
            "/v1/services/{service}/release/{decision}",
            "Decides about the release",
            decision.clone(),
            release.clone(),
        ),
        Operation::post(
            "/v1/services/{service}/standby/extend",
            "Holds the old colour for longer",
            schemas.asked::<ExtendRequest>(),
            release.clone(),
        ),
        Operation::post(
            "/v1/services/{service}/standby/retire",
            "Ends the hold of the old colour",
            decision,
            release,
        ),
    ]
}

fn document() -> Value {
    let mut schemas = Schemas::new();
    let refusal = schemas.answered::<Refusal>();
    let mut paths = Map::new();
    for operation in operations(&mut schemas) {
        let path = paths.entry(operation.path).or_insert_with(|| json!({}));
        path[operation.verb.to_lowercase()] = operation.to_value(&refusal);
    }
    let mut components = schemas.asked.take_definitions(true);
    components.extend(schemas.answered.take_definitions(true));
    let mut components = Value::Object(components);
    plain(&mut components);
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "bgswitch",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "HTTP and JSON on the daemon's Unix socket, by default \
                /run/bgswitch/bgswitch.sock. Who may open the socket may do everything. Within \
                one `schema` number answers may gain fields and never lose one; requests with \
                unknown fields are refused.",
        },
        "servers": [{"url": "http://localhost",
            "description": "curl --unix-socket /run/bgswitch/bgswitch.sock"}],
        "paths": paths,
        "components": {"schemas": components},
    })
}

/// Descriptions without the marks that only rustdoc knows.
fn plain(value: &mut Value) {
    match value {
        Value::Object(map) => {
            if let Some(Value::String(text)) = map.get_mut("description") {
                *text = match text.as_str() {
                    "[`SCHEMA`]." | "[`super::SCHEMA`]." => "The schema number: 1.".to_owned(),
                    text => text.replace("[`", "`").replace("`]", "`"),
                };
            }
            map.values_mut().for_each(plain);
        }
        Value::Array(values) => values.iter_mut().for_each(plain),
        _ => {}
    }
}

#[test]
fn the_file_in_the_repository_is_what_the_code_says() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/openapi.json");
    let document = serde_json::to_string_pretty(&document()).unwrap() + "\n";
    if env::var_os("BGSWITCH_WRITE_OPENAPI").is_some() {
        fs::write(&file, &document).unwrap();
    }
    let advice = "run this test with BGSWITCH_WRITE_OPENAPI=1";
    assert!(fs::read_to_string(&file).unwrap() == document, "{advice}");
}

#[test]
fn every_route_is_described_and_nothing_else_is() {
    let document = document();
    let paths = document["paths"].as_object().unwrap();
    let mut described: Vec<(String, String)> = paths
        .iter()
        .flat_map(|(path, verbs)| {
            let verbs = verbs.as_object().unwrap().keys();
            verbs.map(|verb| (path.clone(), verb.to_uppercase()))
        })
        .collect();
    let mut served: Vec<(String, String)> = routes()
        .into_iter()
        .map(|(verb, path, _)| (path.to_owned(), verb.to_owned()))
        .collect();
    described.sort();
    served.sort();
    assert_eq!(described, served);
}
